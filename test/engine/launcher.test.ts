import { once } from 'node:events';
import { readdirSync, readFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { gpuFacts } from '../../src/engine/gpus.js';
import type { GenerateJob, RunSpec } from '../../src/engine/job.js';
import { launch, type Run } from '../../src/engine/launcher.js';
import type { TpError } from '../../src/errors.js';
import { root } from '../helpers/fixture.js';
import { isAlive } from '../helpers/running.js';
import { tempDir } from '../helpers/tempdir.js';

// what this host's GPUs can do is a matter of the host: one test says it has some
vi.mock('../../src/engine/gpus.js', { spy: true });

const SPEC: RunSpec = {
  model: { kind: 'synthetic', file: 'none', seed: 0 },
  ranks: 2,
  device: 'cpu',
  devices: [],
  dtype: 'bfloat16',
  collective: 'auto',
  isa: 'auto',
  threads: 1,
  limits: { tokens: 1, rows: 1, sequences: 1, positions: 1, candidates: 1 },
  trace: false,
  eager: false,
  initTimeoutMs: 10_000,
  stepTimeoutMs: 10_000,
  logDir: null,
};
const JOB: GenerateJob = {
  kind: 'generate',
  sequences: [],
  sampling: { temperature: 0, topK: 0, topP: 1, seed: 0 },
  stopTokenIds: [],
  keepLogits: false,
  fault: null,
};

/** What the launcher and the ranks say on stderr. */
let said = '';
beforeEach(() => {
  said = '';
  vi.spyOn(process.stderr, 'write').mockImplementation((text) => {
    said += text;
    return true;
  });
});
afterEach(() => vi.restoreAllMocks());

/** NCCL's RAS port as a run finds it: answers every connection with `text`. */
async function fakeRas(text: string): Promise<{ address: string; close(): void }> {
  const server = createServer((socket) => {
    socket.on('error', () => {}).once('data', () => socket.end(text));
  }).listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as { port: number };
  return { address: `127.0.0.1:${port}`, close: () => void server.close() };
}

const start = (how: string, changes: Partial<RunSpec> = {}) =>
  launch(
    { ...SPEC, ...changes },
    { worker: [process.execPath, join(root, 'test/helpers/odd-worker.mjs'), how] },
  );

/** The error that ends a run, and how long it took. */
async function failureOf(promise: Promise<unknown>): Promise<TpError> {
  return promise.then(
    () => {
      throw new Error('it did not fail');
    },
    (error) => error as TpError,
  );
}

async function executeAndClose(run: Run): Promise<unknown[]> {
  try {
    return await run.execute(JOB);
  } finally {
    await run.close();
  }
}

describe('a run of two ranks', () => {
  it('gets ready, does jobs one after another, and ends without a process or a folder', async () => {
    const run = await start('well');
    const pids = run.ranks.map((r) => r.pid);
    expect(run.ranks.map(({ rank, weightBytes }) => [rank, weightBytes])).toEqual([
      [0, 10],
      [1, 11],
    ]);
    expect(pids.every(isAlive)).toBe(true);
    const steps: number[] = [];
    const results = await run.execute(JOB, (step) => void steps.push(step.step));
    expect(results).toEqual([
      { kind: 'generate', steps: 3 },
      { kind: 'generate', steps: 3 },
    ]);
    await run.execute(JOB, (step) => void steps.push(step.step));
    expect(steps).toEqual([0, 1, 2, 0, 1, 2]);
    await run.close();
    await run.close();
    expect(pids.some(isAlive)).toBe(false);
    expect(process.listenerCount('SIGINT') + process.listenerCount('SIGHUP')).toBe(0);
  });

  it('says once which collective it uses and why', async () => {
    await (await start('well')).close();
    expect(said.match(/collective: .*/g)).toEqual(['collective: zmq (peer off: no GPU; nccl off: no GPU)']);
  });

  it('prefixes the ranks’ lines with host and rank, stdout and stderr alike', async () => {
    await (await start('stdout')).close();
    expect(said).toMatch(/^\S+:0 words of rank 0 on stdout$/m);
    expect(said).toMatch(/^\S+:1 words of rank 1 on stdout$/m);
  });

  it('tells each rank its place under the names that torchrun uses', async () => {
    const worker = [process.execPath, join(root, 'test/helpers/odd-worker.mjs'), 'variables'];
    const run = await launch(SPEC, { worker, env: { COLOUR: 'blue' } });
    await run.close();
    expect(said).toMatch(/^\S+:0 0 0 2 blue$/m);
    expect(said).toMatch(/^\S+:1 1 1 2 blue$/m);
  });

  it('keeps a log file per rank in a folder that it makes', async () => {
    const dir = join(tempDir(), 'a', 'b');
    await (await start('stdout', { logDir: dir })).close();
    expect(readdirSync(dir).sort()).toEqual(['rank-0.log', 'rank-1.log']);
    expect(readFileSync(join(dir, 'rank-1.log'), 'utf8')).toBe('words of rank 1 on stdout\n');
  });

  it('hands a thrown onStep error on and ends', async () => {
    const run = await start('well');
    const pids = run.ranks.map((r) => r.pid);
    const failed = run.execute(JOB, () => {
      throw new Error('the disk is full');
    });
    expect((await failureOf(failed)).message).toBe('the disk is full');
    expect(pids.some(isAlive)).toBe(false);
    await run.close();
  });

  it('refuses and logs garbage, and goes on', async () => {
    const run = await start('talks garbage');
    await executeAndClose(run);
    expect(said).toContain('TP_MESSAGE_BAD: message from "nobody" refused: no rank of this run');
    expect(said).toContain('message from rank 1 refused: it says hello as rank 0');
    expect(said).toContain('message from rank 1 refused: stage: ');
    expect(said).toContain('message from rank 1 refused: 1 frames, 0 announced');
  });

  it('goes on when its launcher was held up for longer than a step may take', async () => {
    const run = await start('well', { stepTimeoutMs: 300 });
    let held = false;
    const results = await run.execute(JOB, () => {
      // as a pipe does that nobody reads, or a stopped terminal
      if (!held) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1000);
      held = true;
    });
    expect(results).toHaveLength(2);
    await run.close();
  });

  it('ends a rank that does not stop when told', async () => {
    const run = await start('does not stop');
    const pids = run.ranks.map((r) => r.pid);
    await run.close();
    expect(pids.some(isAlive)).toBe(false);
  });
});

describe('a run that fails', () => {
  it.each([
    [
      'cannot start',
      /^TP_WORKER_DIED: rank 1 on \S+: exited with code 127 in stage spawn, no step completed\n/,
      /last lines of rank 1:\n {2}\| first line\n {2}\| no such library: libodd.so$/,
    ],
    [
      'exits with 0',
      /^TP_WORKER_DIED: rank 1 on \S+: exited with code 0 in stage spawn/,
      /rank 0 on \S+ \(pid \d+\)/,
    ],
  ])('because a rank %s names it, its exit and its last words', async (how, first, more) => {
    const error = await failureOf(start(how));
    expect(error.exitCode).toBe(4);
    expect(error.message).toMatch(first);
    expect(error.message).toMatch(more);
  });

  it('because a rank dies in a job names the step, within 2 s', async () => {
    const run = await start('dies at step 2');
    const at = performance.now();
    const error = await failureOf(run.execute(JOB));
    expect(performance.now() - at).toBeLessThan(2000);
    expect(error.message).toMatch(/rank 1 on \S+: killed by SIGKILL in generate, last completed step 1/);
    expect(run.ranks.some((r) => isAlive(r.pid))).toBe(false);
  });

  it('because of bad input says so as the rank did, with exit code 2 and no summary', async () => {
    const error = await failureOf(start('reports bad input'));
    expect(error.exitCode).toBe(2);
    expect(error.message).toBe('TP_SHARD_UNEVEN: 3 heads [rank 1/2]');
  });

  it.each([
    ['never connects', 'spawn'],
    ['hangs in weights', 'weights'],
  ])('because a rank %s names rank and stage', async (how, stage) => {
    const error = await failureOf(start(how, { initTimeoutMs: 1000 }));
    expect(error.message).toMatch(
      new RegExp(`^TP_STAGE_TIMEOUT: rank 1 on \\S+ did not get past stage ${stage} within 1000 ms`),
    );
    expect(error.exitCode).toBe(4);
  });

  it('does not blame a stage that takes longer but moves', async () => {
    const run = await start('loads slowly', { initTimeoutMs: 700 });
    await run.close();
  });

  it('because ranks disagree names step, sequence and both tokens', async () => {
    const run = await start('disagrees at step 1');
    const steps: number[] = [];
    const error = await failureOf(run.execute(JOB, ({ step }) => void steps.push(step)));
    expect(error.message).toContain(
      'TP_RANKS_DISAGREE: step 1: ranks disagree on token (sequence 0, position 1): rank 0: 1; rank 1: 999',
    );
    expect(steps).toEqual([0]);
  });

  it('because a rank made fewer steps says which', async () => {
    const error = await failureOf((await start('stops early')).execute(JOB));
    expect(error.message).toContain('step 2: ranks disagree on the number of steps: only rank 0 made it');
  });

  it('because a rank computes for ever names that rank, not the one that waits for it', async () => {
    const run = await start('gets stuck at step 2', { stepTimeoutMs: 500 });
    const error = await failureOf(run.execute(JOB));
    expect(error.message).toMatch(/^TP_STEP_TIMEOUT: rank 1 on \S+ holds up the run: no step for 500 ms/);
    expect(error.message).toContain(
      'last completed step 1; rank 0: waits for rank 1 in allReduce #9; rank 1: computes step 2',
    );
  });

  it('lays the ranks’ last collectives side by side: who never came, or came with another size', async () => {
    const late = await failureOf((await start('gets stuck at step 2', { stepTimeoutMs: 500 })).execute(JOB));
    expect(late.message).toMatch(
      /^collectives: rank 1 never came to allReduce #9 \(layer 2 down, 64 bytes\), in which rank 0 has waited for 500 ms$/m,
    );
    expect(late.message).toMatch(/^ {2}rank 0 .*, in allReduce #9 \(layer 2 down, 64 bytes\); running$/m);
    const odd = await failureOf((await start('sends another size', { stepTimeoutMs: 500 })).execute(JOB));
    expect(odd.message).toMatch(
      /^collectives: rank 0 is at allReduce #9 \(layer 2 down, 64 bytes\), rank 1 at allReduce #9 \(layer 2 down, 32 bytes\)$/m,
    );
  });

  it('attaches what NCCL says of a run that hangs: each rank’s asynchronous error, and the report of its RAS threads', async () => {
    const { address, close } = await fakeRas('OK\nJob summary\n  rank 1 MISMATCH\n');
    vi.mocked(gpuFacts).mockReturnValue({ peers: [], peersOff: null, ncclWhy: null });
    const logDir = tempDir();
    const started = launch(
      { ...SPEC, device: 'cuda', devices: [0, 1], collective: 'nccl', stepTimeoutMs: 500, logDir },
      {
        worker: [process.execPath, join(root, 'test/helpers/odd-worker.mjs'), 'has lost a link'],
        env: { ...process.env, NCCL_RAS_ADDR: address },
      },
    );
    const error = await failureOf(started.then((run) => run.execute(JOB)));
    vi.mocked(gpuFacts).mockReset();
    close();
    expect(error.message).toMatch(/^TP_STEP_TIMEOUT: rank 1/);
    expect(error.message).toMatch(/^ {2}rank 0 on .*; running; nccl: remote process exited$/m);
    expect(error.message).toMatch(/^likely cause: another rank, or the network between them, is gone/m);
    expect(error.message).toMatch(/^NCCL reports:\n {2}\| Job summary\n {2}\| {3}rank 1 MISMATCH$/m);
    const report = JSON.parse(readFileSync(join(logDir, 'error.json'), 'utf8'));
    expect(report.nccl_ras).toBe('Job summary\n  rank 1 MISMATCH');
    expect(report.ranks.map((rank: { async_error: unknown }) => rank.async_error)).toEqual([
      'nccl: remote process exited',
      null,
    ]);
  });

  it('writes error.json beside the logs: the failure, and of each rank its place, exit, last words and collectives', async () => {
    const logDir = tempDir();
    const run = await start('dies at step 2', { logDir });
    const error = await failureOf(run.execute(JOB));
    expect(error.message).toMatch(
      /^likely cause: somebody sent SIGKILL, or the kernel did for lack of memory/m,
    );
    const report = JSON.parse(readFileSync(join(logDir, 'error.json'), 'utf8'));
    expect(report).toMatchObject({
      schema: 'tp-run/error/1',
      code: 'TP_WORKER_DIED',
      exit_code: 4,
      culprits: [1],
      likely_cause: expect.stringContaining('SIGKILL'),
      ranks: [
        { rank: 0, pid: run.ranks[0]!.pid, stage: 'ready', job: null, last_step: 2, exit: 'running' },
        { rank: 1, pid: run.ranks[1]!.pid, job: 'generate', last_step: 1, exit: 'killed by SIGKILL' },
      ],
    });
    expect(report.ranks[0].collectives.at(-1)).toMatchObject({
      n: 9,
      op: 'allReduce',
      bytes: 64,
      tookMs: null,
    });
    expect(report.ranks[1].collectives).toBe(null);
    expect(Math.abs(Date.parse(report.time) - Date.now())).toBeLessThan(60_000);
  });

  it('takes a rank along that ignores SIGTERM, and a process that a rank has left', async () => {
    for (const how of ['ignores SIGTERM', 'leaves a child']) {
      const run = await start(how);
      process.kill(run.ranks[0]!.pid, 'SIGKILL');
      const at = performance.now();
      await failureOf(run.execute(JOB));
      expect(performance.now() - at).toBeLessThan(2000);
      expect(run.ranks.some((r) => isAlive(r.pid))).toBe(false);
    }
  });

  it('leaves no folder of sockets', async () => {
    const folder = tempDir();
    vi.stubEnv('TMPDIR', folder);
    await failureOf(start('cannot start'));
    await (await start('well')).close();
    vi.unstubAllEnvs();
    expect(readdirSync(folder)).toEqual([]);
  });

  it('before it begins, when the collective cannot work or the log folder cannot be made', async () => {
    const error = await failureOf(start('well', { collective: 'nccl' }));
    expect(error.message).toBe(
      'TP_COLLECTIVE_UNSUPPORTED: collective nccl cannot be used here: no GPU; use auto',
    );
    const file = join(root, 'package.json', 'logs');
    expect((await failureOf(start('well', { logDir: file }))).message).toMatch(/^TP_LOG_DIR: .*ENOTDIR/);
  });
});

describe('signals to the launcher', () => {
  it.each(['SIGINT', 'SIGTERM', 'SIGHUP'] as const)('%s ends a run with 130', async (signal) => {
    const run = await start('well');
    const failed = failureOf(run.execute(JOB, () => new Promise(() => {})));
    process.kill(process.pid, signal);
    const error = await failed;
    expect([error.exitCode, error.message]).toEqual([130, `TP_INTERRUPTED: stopped by ${signal}`]);
    expect(run.ranks.some((r) => isAlive(r.pid))).toBe(false);
  });

  it('is heard while ranks start', async () => {
    const starting = failureOf(start('never connects'));
    setTimeout(() => process.kill(process.pid, 'SIGTERM'), 100);
    expect((await starting).code).toBe('TP_INTERRUPTED');
  });
});
