import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, describe, expect, it } from 'vitest';
import { newEntry, register } from '../../src/engine/registry.js';
import { isAlive, Running, until } from '../helpers/running.js';
import { tpRun } from '../helpers/tp-run.js';

const folder = mkdtempSync(join(tmpdir(), 'tp-run-test-'));
afterAll(() => rmSync(folder, { recursive: true }));
const runs: Running[] = [];
afterEach(async () => {
  for (const run of runs) run.signal('SIGKILL');
  for (const run of runs.splice(0)) await run.ended;
});

function start(): Running {
  const words = ['--device', 'cpu', '--gpus', '2', '--threads', '1', '--prompt-ids', '2,17,5'];
  const run = new Running([...words, '--max-tokens', '4000', '--ignore-eos'], { TMPDIR: folder });
  runs.push(run);
  return run;
}
const ask = (...words: string[]) => tpRun(words, { TMPDIR: folder });
const listed = async () =>
  JSON.parse((await ask('ps', '--json')).stdout).runs as { run: string; pid: number }[];

describe('ps and kill', () => {
  it('list runs and end one by the beginning of its id, with all its processes and nothing left', async () => {
    expect((await ask('ps')).stdout).toBe('no run of this user on this host\n');
    const first = start();
    await first.decoding();
    const second = start(); // looks at what lies there: the first one must not mind
    await second.decoding();
    const found = await listed();
    expect(found.map(({ pid }) => pid).sort()).toEqual([first.pid, second.pid].sort());
    const line = (await ask('ps')).stdout.split('\n').find((text) => text.includes(` ${first.pid} `));
    expect(line).toMatch(/^[0-9a-f]{16} +\d+ +- +2 of 2 +cpu +\d{4}-\d\d-\d\dT\S+ +\S+tiny\.json$/);
    const pids = [first.pid, ...first.workers()];
    const { run } = found.find(({ pid }) => pid === first.pid)!;
    const { code, stderr } = await ask('kill', run.slice(0, 8));
    expect([code, stderr]).toEqual([0, `run ${run}: ended\n`]);
    expect(pids.some(isAlive)).toBe(false);
    const ended = await first.ended;
    expect(ended.code).toBe(130);
    expect(ended.stderr).not.toContain('warn');
    expect((await listed()).map(({ pid }) => pid)).toEqual([second.pid]);
    await ask('kill', 'all');
    await second.ended;
    expect(readdirSync(folder)).toEqual([]);
  });

  it('end a launcher that hangs, by force', async () => {
    const run = start();
    await run.decoding();
    const pids = [run.pid, ...run.workers()];
    run.signal('SIGSTOP');
    const { stderr } = await ask('kill', 'all');
    expect(stderr).toMatch(/: ended, \d processes by SIGKILL\n$/);
    await until(() => !pids.some(isAlive), 1000);
    expect(readdirSync(folder)).toEqual([]);
  });

  it('say when there is no such run', async () => {
    const { code, stderr } = await ask('kill', 'abc');
    expect(stderr).toBe('TP_RUN_UNKNOWN: no run of this user on this host begins with abc; there is none\n');
    expect(code).toBe(2);
  });

  it('end nothing when no run or more than one can be meant', async () => {
    // entries of two runs whose launcher is this process, which must live on
    const folders = ['ab12', 'ab34'].map((run) => {
      const dir = mkdtempSync(join(folder, 'tp-run-'));
      const about = { run, node: 0, nodes: 1, ranks: 0, device: 'cpu', model: 'x' };
      register(dir, newEntry(about, []));
      return dir;
    });
    const several = await ask('kill', 'ab');
    expect(several.stderr).toMatch(
      /^TP_RUN_AMBIGUOUS: 2 runs begin with ab: ab\d\d, ab\d\d; give more of the one you mean, or "all"$/m,
    );
    const none = await ask('kill', '');
    expect(none.stderr).toMatch(
      /^TP_RUN_UNKNOWN: no run of this user on this host begins with ""; there is ab/,
    );
    expect([several.code, none.code]).toEqual([2, 2]);
    for (const dir of folders) rmSync(dir, { recursive: true });
    const { code, stderr } = await ask('kill', 'all');
    expect([code, stderr]).toEqual([0, 'no run of this user on this host\n']);
  });

  it('see nothing of a run that was killed, whose folder the next start takes away', async () => {
    const run = start();
    await run.decoding();
    const workers = run.workers();
    run.signal('SIGKILL');
    await run.ended;
    await until(() => !workers.some(isAlive), 1000);
    expect(await listed()).toEqual([]);
    expect(readdirSync(folder)).toHaveLength(1);
    writeFileSync(join(folder, 'tp-run-notours'), 'a file of somebody else');
    const next = start();
    await next.decoding();
    expect(readdirSync(folder)).toHaveLength(2);
    await ask('kill', 'all');
    await next.ended;
    rmSync(join(folder, 'tp-run-notours'));
  });
});
