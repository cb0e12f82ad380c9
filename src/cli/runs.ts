// `tp-run ps` and `tp-run kill`: the runs of this user on this host.

import { rmSync } from 'node:fs';
import { type FoundRun, findRuns, lives } from '../engine/registry.js';
import { EXIT, fail } from '../errors.js';
import { log } from '../log.js';
import { table } from '../report/table.js';
import type { Options } from './options.js';
import { print, printJson } from './output.js';

/** A run that was asked to end has this long to do so, in ms. */
const PATIENCE_MS = 3000;

export function ps({ json }: Pick<Options, 'json'>): number {
  const runs = findRuns();
  if (json) {
    const listed = runs.map(({ folder: _, launcher, workers, ...run }) => ({
      ...run,
      pid: launcher.pid,
      workers: workers.map(({ rank, pid }) => ({ rank, pid })),
    }));
    printJson({ schema: 'tp-run/ps/1', runs: listed });
  } else print(runs.length ? lines(runs) : 'no run of this user on this host\n');
  return EXIT.ok;
}

/** `tp-run kill RUN`, by the beginning of its id, or `tp-run kill all`. TP_RUN_UNKNOWN, TP_RUN_AMBIGUOUS. */
export async function killRuns(which: string): Promise<number> {
  const runs = findRuns();
  if (which === 'all') {
    if (runs.length === 0) log.info('no run of this user on this host');
    await Promise.all(runs.map(end));
    return EXIT.ok;
  }
  const ids = [...new Set(runs.map(({ run }) => run))];
  // nothing is the beginning of every id: what an unset variable gives must not end them all
  const chosen = which === '' ? [] : ids.filter((id) => id.startsWith(which));
  if (chosen.length === 0) throw fail('TP_RUN_UNKNOWN', which, ids);
  if (chosen.length > 1) throw fail('TP_RUN_AMBIGUOUS', which, chosen);
  await Promise.all(runs.filter(({ run }) => run === chosen[0]).map(end));
  return EXIT.ok;
}

/** Asks the launcher, which ends its ranks; what does not end by then is ended. */
async function end({ run, launcher, workers, folder }: FoundRun): Promise<void> {
  const all = [launcher, ...workers];
  signal(launcher.pid, 'SIGTERM');
  const late = performance.now() + PATIENCE_MS;
  while (all.some(lives) && performance.now() < late) await new Promise((done) => setTimeout(done, 20));
  const left = all.filter(lives);
  // a rank leads a group of its own
  for (const { pid } of left) signal(pid === launcher.pid ? pid : -pid, 'SIGKILL');
  if (left.length) rmSync(folder, { recursive: true, force: true });
  log.info(`run ${run}: ended${left.length ? `, ${left.length} processes by SIGKILL` : ''}`);
}

function signal(pid: number, name: NodeJS.Signals): void {
  try {
    process.kill(pid, name);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

function lines(runs: readonly FoundRun[]): string {
  const rows = runs.map(({ run, launcher, node, nodes, ranks, workers, device, since, model }) => [
    run,
    String(launcher.pid),
    nodes === 1 ? '-' : `${node} of ${nodes}`,
    `${workers.length} of ${ranks}`,
    device,
    since,
    model,
  ]);
  return table(['run', 'pid', 'node', 'ranks here', 'device', 'since', 'model'], rows);
}
