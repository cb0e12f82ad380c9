import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { describeExit, RankFailure, type RankState } from '../../src/engine/failure.js';
import { RankProcess } from '../../src/engine/process.js';
import { Supervisor } from '../../src/engine/supervise.js';
import { TpError } from '../../src/errors.js';
import { isAlive, until } from '../helpers/running.js';

const BARE = { prefix: '', logFile: null, env: undefined, input: '' };
const states: RankState[] = [];
beforeEach(() => void vi.spyOn(process.stderr, 'write').mockReturnValue(true)); // the ranks' own words
afterEach(() => {
  vi.restoreAllMocks();
  for (const { process } of states.splice(0)) process.kill('SIGKILL');
});

/** A process that runs a line of JavaScript, as the rank of that number. */
function rank(number: number, script: string): RankState {
  const process_ = new RankProcess([process.execPath, '-e', script], BARE, () => {});
  const state: RankState = {
    rank: number,
    host: 'here',
    process: process_,
    stage: 'ready',
    job: 'generate',
    hasReported: false,
    step: 3 + number,
    heardAt: 0,
    collectives: null,
    asyncError: '',
  };
  states.push(state);
  return state;
}

const SLEEP = 'setTimeout(() => {}, 1e6)';
/** Watches over a run that nobody can be asked about. */
const watched = (cleanUp = () => {}) => ({
  run: 'run-1',
  inquire: async () => {},
  diagnose: async () => null,
  cleanUp,
  onFailure: () => {},
});
const error = (text: string) => new TpError('TP_TEST', 4, text);

describe('the supervisor', () => {
  it('takes the earliest of several failures as the root cause', async () => {
    const supervisor = new Supervisor([], watched());
    supervisor.fail(error('later'), 20);
    supervisor.fail(error('earliest'), 10);
    supervisor.fail(error('latest'), 30);
    await expect(supervisor.failed).rejects.toThrow('earliest');
    supervisor.fail(error('too late'), 0);
    await expect(supervisor.guard(new Promise(() => {}))).rejects.toThrow('earliest');
  });

  it('rejects only when every rank has gone and all is cleaned up', async () => {
    const ranks = [rank(0, SLEEP), rank(1, SLEEP)];
    let clean = false;
    const supervisor = new Supervisor(
      ranks,
      watched(() => {
        clean = ranks.every(({ process }) => !isAlive(process.pid!));
      }),
    );
    supervisor.fail(error('stop'));
    await expect(supervisor.failed).rejects.toThrow('stop');
    expect(clean).toBe(true);
  });

  it('tells of every rank what it was at when it happened, and the last 20 lines of the culprit', async () => {
    const ranks = [rank(0, SLEEP), rank(1, 'for (let i = 1; i <= 30; i++) console.error("line", i)')];
    await ranks[1]!.process.closed;
    const supervisor = new Supervisor(ranks, watched());
    supervisor.fail(new RankFailure(error('rank 1 is gone'), [1]));
    const { message } = (await supervisor.failed.catch((e) => e)) as TpError;
    const lines = message.split('\n');
    expect(lines[0]).toBe('TP_TEST: rank 1 is gone');
    expect(lines[1]).toMatch(/^ {2}rank 0 on here \(pid \d+\): in generate, last completed step 3; running$/);
    expect(lines[2]).toMatch(
      /^ {2}rank 1 on here \(pid \d+\): in generate, last completed step 4; exited with code 0$/,
    );
    expect(lines.slice(3)).toEqual([
      'last lines of rank 1:',
      ...Array.from({ length: 20 }, (_, i) => `  | line ${i + 11}`),
    ]);
  });

  it('cuts the last lines of a culprit where they are long: they may have to cross to another host', async () => {
    const long = rank(0, 'console.error("x".repeat(3_000_000)); console.error("end")');
    await long.process.closed;
    expect(long.process.tail).toEqual([`${'x'.repeat(1000)}...`, 'end']);
  });

  it('tells of the end also when cleaning up fails', async () => {
    const supervisor = new Supervisor(
      [],
      watched(() => {
        throw new Error('the folder is busy');
      }),
    );
    supervisor.fail(error('stop'));
    await expect(supervisor.failed).rejects.toThrow('stop');
  });

  it('ends what a rank has left running in its group', async () => {
    const child = `const c = require('child_process').spawn('sleep', ['1000'], { stdio: 'inherit' }); console.error(c.pid)`;
    const left = rank(0, `${child}; process.exit(0)`);
    const supervisor = new Supervisor([left], watched());
    while (left.process.tail.length === 0 || left.process.exit === null)
      await new Promise((r) => setTimeout(r, 5));
    const pid = Number(left.process.tail[0]);
    expect(isAlive(pid)).toBe(true);
    supervisor.fail(error('stop'));
    await supervisor.failed.catch(() => {});
    await until(() => !isAlive(pid), 500); // its pipes close a moment before it is gone
  });

  it('gives the signals back when the run is over', async () => {
    const before = process.listenerCount('SIGTERM');
    const supervisor = new Supervisor([], watched());
    expect(process.listenerCount('SIGTERM')).toBe(before + 1);
    await supervisor.finish(10);
    expect(process.listenerCount('SIGTERM')).toBe(before);
  });
});

describe('an exit', () => {
  it('is told by its signal or its code', () => {
    expect(describeExit(null)).toBe('running');
    expect(describeExit({ code: null, signal: 'SIGSEGV', at: 0 })).toBe('killed by SIGSEGV');
    expect(describeExit({ code: 134, signal: null, at: 0 })).toBe('exited with code 134');
  });

  it('of a command that does not exist is an exit too', async () => {
    const exit = await new Promise((resolve) => {
      new RankProcess(['/no/such/command'], BARE, resolve);
    });
    expect(exit).toMatchObject({ code: 127, signal: null });
  });
});
