// What native code does to processor time around ranks that wait for each other.

import { readdirSync, readFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { describe, expect, it } from 'vitest';
import { native } from '../../src/native.js';
import { Running, sleep } from '../helpers/running.js';

/** Scheduling policy of every thread of a process, by its name in sched.h: field 41 of /proc/PID/task/TID/stat. */
function policies(pid: number | 'self'): number[] {
  return readdirSync(`/proc/${pid}/task`).map((task) => {
    const stat = readFileSync(`/proc/${pid}/task/${task}/stat`, 'utf8');
    return Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[38]);
  });
}
const SCHED_IDLE = 5;

/** The cores that each thread of a process may use, "0-1". */
function coresOf(pid: number): string[] {
  return readdirSync(`/proc/${pid}/task`).map((task) => {
    const status = readFileSync(`/proc/${pid}/task/${task}/status`, 'utf8');
    return /^Cpus_allowed_list:\s+(\S+)/m.exec(status)![1]!;
  });
}

describe('staying awake', () => {
  it('is one thread of idle priority, and it ends by itself', async () => {
    native().stayAwake(20);
    native().stayAwake(20);
    await sleep(150);
    expect(policies('self').filter((policy) => policy === SCHED_IDLE)).toHaveLength(1);
    const before = process.cpuUsage();
    await sleep(500);
    const { user, system } = process.cpuUsage(before);
    expect((user + system) / 1000).toBeLessThan(100); // ms of 500
  });
});

describe('the cores of ranks', () => {
  it.runIf(availableParallelism() >= 2)('are shared out, to every thread of a rank', async () => {
    const run = new Running([
      ...['--gpus', '2', '--device', 'cpu', '--threads', '1', '--prompt-ids', '2,17,5'],
      ...['--max-tokens', '4000', '--ignore-eos'],
    ]);
    const workers = await run.spawned(2);
    await run.decoding();
    const [first, second] = workers.map((pid) => new Set(coresOf(pid)));
    run.signal('SIGINT');
    await run.ended;
    expect(first!.size).toBe(1);
    expect(second!.size).toBe(1);
    expect([...first!][0]).not.toBe([...second!][0]);
  });
});
