// Real runs, real kills, at random moments. TEST_FAULTS sets how many of each (10); TEST_SEED repeats a sequence.

import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { root } from '../helpers/fixture.js';
import { randomFrom } from '../helpers/random.js';
import { commandLine, isAlive, Running, residentMiB, sleep, until } from '../helpers/running.js';

const TIMES = Number(process.env.TEST_FAULTS ?? 10);
const SEED = Number(process.env.TEST_SEED ?? Date.now() % 1_000_000);
const AT_ONCE = 2;
const RANKS = 2;

const folder = mkdtempSync(join(tmpdir(), 'tp-run-test-'));
const heavy = join(folder, 'heavy.json');

const leftBehind = () => readdirSync(folder).filter((name) => name.startsWith('tp-run-'));

/** The tiny model with many wide experts: its loading takes long enough to be hit in the middle. */
beforeAll(() => {
  const tiny = JSON.parse(readFileSync(join(root, 'configs/tiny.json'), 'utf8'));
  tiny.config.moe_intermediate_size = 512;
  tiny.config.num_experts = 128;
  writeFileSync(heavy, JSON.stringify(tiny));
  console.log(`seed ${SEED}: repeat with TEST_SEED=${SEED}`);
});
afterAll(() => rmSync(folder, { recursive: true }));

/** A run that goes on for a while if nothing happens to it; its sockets lie in a folder of ours. */
const start = (...more: string[]) =>
  new Running(
    [
      ...['--gpus', String(RANKS), '--device', 'cpu', '--threads', '1'],
      ...['--prompt-ids', '2,17,5', '--max-tokens', '4000', '--ignore-eos', ...more],
    ],
    { TMPDIR: folder },
  );

/** Does `attempt` TIMES times, AT_ONCE at a time, each with random numbers of its own; says which one failed. */
async function repeat(attempt: (random: () => number) => Promise<void>): Promise<void> {
  let next = 0;
  const worker = async () => {
    while (next < TIMES) {
      const i = next++;
      await attempt(randomFrom(SEED + i)).catch((error: Error) => {
        error.message = `attempt ${i} with TEST_SEED=${SEED}: ${error.message}`;
        throw error;
      });
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
}

/** A moment of a run: while its processes start, or some time into decoding. */
async function someMoment(run: Running, random: () => number): Promise<void> {
  await run.spawned(RANKS);
  if (random() < 0.5) return sleep(random() * 500);
  await run.decoding();
  await sleep(random() * 200);
}

/** Some time after `worker` has begun to fill its memory with weights. */
async function loading(worker: number, random: () => number): Promise<void> {
  await until(() => !isAlive(worker) || residentMiB(worker) > 150, 20_000);
  await sleep(random() * 50);
}

const gone = (workers: readonly number[]) => () => !workers.some(isAlive);

const LIMIT = 300_000;

describe('a run with a fault', () => {
  it(
    'ends within 2 s with code 4 when a rank is killed, and names rank, stage and last step',
    async () => {
      const places: string[] = [];
      await repeat(async (random) => {
        const inWeights = random() < 0.3;
        const run = inWeights ? start('--model', heavy) : start();
        const workers = await run.spawned(RANKS);
        const victim = Math.floor(random() * RANKS);
        await (inWeights ? loading(workers[victim]!, random) : someMoment(run, random));
        const at = performance.now();
        process.kill(workers[victim]!, 'SIGKILL');
        const { code, stderr } = await run.ended;
        const took = performance.now() - at;
        const said = new RegExp(
          `^TP_WORKER_DIED: rank ${victim} on \\S+: killed by SIGKILL in (stage [\\w-]+|generate), ` +
            '(no step completed|last completed step \\d+)',
          'm',
        ).exec(stderr);
        expect(said, stderr).not.toBeNull();
        expect(code, stderr).toBe(4);
        expect(took).toBeLessThan(2000);
        expect(gone(workers)()).toBe(true);
        places.push(said![1]!);
      });
      console.log(`killed in: ${places.sort().join(', ')}`);
      // the moments were random enough to hit all parts of a run's life
      if (TIMES >= 50)
        expect(places).toEqual(expect.arrayContaining(['stage spawn', 'stage weights', 'generate']));
    },
    LIMIT,
  );

  it(
    'leaves no worker 1 s after its launcher was killed',
    async () => {
      await repeat(async (random) => {
        const run = start();
        await someMoment(run, random);
        run.signal('SIGSTOP'); // nothing is started between the look and the kill
        const workers = run.workers();
        run.signal('SIGKILL');
        await until(gone(workers), 1000);
        await run.ended;
      });
    },
    LIMIT,
  );

  it(
    'ends with 130 within 1 s of Ctrl-C, without a worker or a trace of itself',
    async () => {
      await repeat(async (random) => {
        const run = start();
        await someMoment(run, random);
        const workers = run.workers();
        const at = performance.now();
        run.signal('SIGINT');
        const { code, stderr } = await run.ended;
        expect(performance.now() - at).toBeLessThan(1000);
        expect(code, stderr).toBe(130);
        expect(stderr).toMatch(/TP_INTERRUPTED: stopped by SIGINT\n$/);
        expect(gone(workers)()).toBe(true);
      });
    },
    LIMIT,
  );

  it(
    'leaves nothing behind after SIGTERM during start-up',
    async () => {
      await repeat(async (random) => {
        const run = start();
        await sleep(random() * 600);
        run.signal('SIGSTOP');
        const workers = run.workers();
        run.signal('SIGTERM');
        run.signal('SIGCONT');
        const { code, signal, stderr } = await run.ended;
        // before its first instruction the signal's own default ends it
        expect(signal === 'SIGTERM' || code === 130, `${code} ${signal} ${stderr}`).toBe(true);
        expect(gone(workers)()).toBe(true);
      });
    },
    LIMIT,
  );

  it(
    'names the rank that is stopped in the middle of decoding',
    async () => {
      await repeat(async (random) => {
        const run = start('--step-timeout', '1.5'); // a step of a busy machine is no fault
        const workers = await run.spawned(RANKS);
        await run.decoding();
        await sleep(random() * 100);
        const victim = Math.floor(random() * RANKS);
        process.kill(workers[victim]!, 'SIGSTOP');
        const { code, stderr } = await run.ended;
        expect(stderr).toMatch(
          new RegExp(
            `^TP_STEP_TIMEOUT: rank ${victim} on \\S+ \\(no answer: stopped or stuck\\) holds up the run`,
            'm',
          ),
        );
        // a rank's own words and its record number collectives alike
        const said = /rank (\d+): (?:rank \d+ waited \d+ ms|waits) for rank \d+ in \w+ (#\d+)/.exec(stderr);
        expect(said, stderr).not.toBe(null);
        expect(stderr).toMatch(new RegExp(`^ {2}rank ${said![1]} .*, in \\w+ ${said![2]} \\(`, 'm'));
        expect(code).toBe(4);
        expect(gone(workers)()).toBe(true);
      });
    },
    LIMIT,
  );

  it(
    'names the rank and the stage when one is stopped while it starts',
    async () => {
      const run = start('--init-timeout', '3');
      const workers = await run.spawned(RANKS);
      // stopped before it has become a program of its own, it would hold the launcher's fork up as well
      await until(() => commandLine(workers[1]!).includes(' worker '), 5000);
      process.kill(workers[1]!, 'SIGSTOP');
      const { code, stderr } = await run.ended;
      expect(stderr).toMatch(/^TP_STAGE_TIMEOUT: rank 1 on \S+ did not get past stage \w+ within 3000 ms/m);
      expect(code).toBe(4);
      expect(gone(workers)()).toBe(true);
    },
    LIMIT,
  );

  it(
    'takes away the sockets that killed launchers left',
    async () => {
      const killed = start();
      await killed.decoding();
      killed.signal('SIGKILL');
      await killed.ended;
      expect(leftBehind()).not.toEqual([]);
      const run = start();
      await run.decoding();
      expect(leftBehind()).toHaveLength(1); // its own
      run.signal('SIGINT');
      await run.ended;
      expect(leftBehind()).toEqual([]);
    },
    LIMIT,
  );
});
