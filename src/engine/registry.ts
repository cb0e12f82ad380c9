// The runs of this user on this host: each keeps run.json in its private folder, from which `ps` and `kill` read, and
// from which the next start sees what a killed run has left.

import { lstatSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { z } from 'zod';
import { isPrivate } from '../comm/bootstrap.js';

const count = z.number().int().nonnegative();
/** A process id alone may be another process by now: the moment of its start makes it the one. */
const processSchema = z.strictObject({ pid: count.positive(), started: z.string() });
export type ProcessId = z.infer<typeof processSchema>;

const entrySchema = z.strictObject({
  run: z.string().regex(/^[0-9a-f]{1,64}$/),
  /** ISO 8601 */
  since: z.string(),
  node: count,
  nodes: count,
  ranks: count,
  device: z.string(),
  model: z.string(),
  launcher: processSchema,
  /** The ranks on this host. */
  workers: z.array(processSchema.extend({ rank: count })),
});
export type RunEntry = z.infer<typeof entrySchema>;

export interface FoundRun extends RunEntry {
  folder: string;
}

const FILE = 'run.json';

/** Writes or replaces the entry of the run whose folder is `dir`. */
export function register(dir: string, entry: RunEntry): void {
  const fresh = join(dir, `${FILE}.new`);
  writeFileSync(fresh, JSON.stringify(entry), { mode: 0o600 });
  renameSync(fresh, join(dir, FILE)); // a reader sees the old one or the new one
}

/** Runs whose launcher lives, oldest first. */
export function findRuns(parent = tmpdir()): FoundRun[] {
  return folders(parent)
    .flatMap((folder) => {
      const entry = readEntry(folder);
      return entry && lives(entry.launcher) ? [{ ...entry, folder }] : [];
    })
    .sort((a, b) => a.since.localeCompare(b.since));
}

/** True when the folder's run is over though it is still here: its launcher was killed. */
export function isLeftBehind(folder: string): boolean {
  const entry = readEntry(folder);
  return entry !== null && !lives(entry.launcher);
}

/** The process of that id, as it can be found again; null when there is none. */
export function processId(pid: number): ProcessId | null {
  const started = startOf(pid);
  return started === null ? null : { pid, started };
}

export function lives({ pid, started }: ProcessId): boolean {
  return startOf(pid) === started;
}

/** Clock ticks after boot at which a process began; null when it is gone or only waits to be buried. */
function startOf(pid: number): string | null {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    // the name in brackets may hold anything; field 3 is the state, field 22 the start
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    return 'ZX'.includes(fields[0]!) ? null : fields[19]!;
  } catch {
    return null;
  }
}

/** Shared memory that NCCL makes and that a killed run leaves: files of this user that no process uses any more. */
export function removeSharedMemory(dir = '/dev/shm', olderThanMs = 60_000): void {
  const now = Date.now();
  const files = list(dir)
    .filter((name) => /^nccl-\w+$/.test(name))
    .map((name) => join(dir, name))
    .filter((path) => {
      const stat = lstatSync(path, { throwIfNoEntry: false });
      // a young one may be about to be mapped
      return stat?.isFile() && stat.uid === process.getuid!() && now - stat.mtimeMs > olderThanMs;
    });
  if (files.length === 0) return;
  const used = mappedFiles();
  for (const path of files) if (!used.has(path)) rmSync(path, { force: true });
}

/** Every file that a process of this user maps or holds open below /dev/shm. */
function mappedFiles(): Set<string> {
  const used = new Set<string>();
  for (const pid of list('/proc').filter((name) => /^\d+$/.test(name))) {
    try {
      const maps = readFileSync(`/proc/${pid}/maps`, 'utf8');
      for (const [path] of maps.matchAll(/\/\S*nccl-\w+/g)) used.add(path);
    } catch {
      // it has ended, or is another user's, who cannot map this user's file
    }
  }
  return used;
}

function readEntry(folder: string): RunEntry | null {
  try {
    if (!isPrivate(folder)) return null;
    return entrySchema.parse(JSON.parse(readFileSync(join(folder, FILE), 'utf8')));
  } catch {
    return null;
  }
}

function folders(parent: string): string[] {
  return list(parent)
    .filter((name) => /^tp-run-\w{6}$/.test(name))
    .map((name) => join(parent, name));
}

function list(dir: string): string[] {
  try {
    return readdirSync(dir);
  } catch {
    return [];
  }
}

/** The entry of ranks that this process has just started. */
export function newEntry(
  about: Pick<RunEntry, 'run' | 'node' | 'nodes' | 'ranks' | 'device' | 'model'>,
  ranks: readonly (readonly [rank: number, pid: number | undefined])[],
): RunEntry {
  const workers = ranks.flatMap(([rank, pid]) => {
    const id = pid === undefined ? null : processId(pid);
    return id ? [{ rank, ...id }] : [];
  });
  return { ...about, since: new Date().toISOString(), launcher: processId(process.pid)!, workers };
}
