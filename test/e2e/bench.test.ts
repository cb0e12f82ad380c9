import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { MOE_VARIANTS } from '../../src/native.js';
import { gpuNames } from '../../src/report/machine.js';
import { AllReduceBench, DecodeBench, DoctorResult, MoeBench } from '../../src/report/schema.js';
import type { TraceEvent } from '../../src/report/trace.js';
import { tempDir } from '../helpers/tempdir.js';
import { tpRun, tpRunJson } from '../helpers/tp-run.js';
import { expectNesting, inside, timedOf } from '../helpers/trace-events.js';

const cpu = ['--device', 'cpu', '--threads', '1'];

describe('bench decode', () => {
  const args = [
    'bench',
    'decode',
    ...cpu,
    '--gpus',
    '2',
    '--batch-size',
    '1,3',
    '--steps',
    '8',
    '--warmup',
    '2',
  ];

  it('says what a token costs and which share of the read bandwidth it uses', async () => {
    const out = join(tempDir(), 'bench.json');
    const { code, stdout } = await tpRun([...args, '--context', '5', '--out', out]);
    expect(code).toBe(0);
    expect(stdout).toMatch(
      /^context +batch +TPOT ms +p10 +p90 +p99 +tokens\/s +GB\/step +GB\/s +of bandwidth +compute +sync +host$/m,
    );
    const bench = DecodeBench.parse(JSON.parse(readFileSync(out, 'utf8')));
    const { rows, read_bandwidth_gb_per_s: best, read_bandwidth_samples: readings, provenance, run } = bench;
    expect(readings).toHaveLength(1 + rows.length * 5); // before, and behind each round
    expect(best).toBe(Math.max(...readings.map(Number)));
    expect(rows.map(({ batch }) => batch)).toEqual([1, 3]);
    expect(rows.map(({ stages }) => stages)).toEqual([null, null]);
    for (const row of rows) {
      expect(row.tpot_ms.samples).toHaveLength(8);
      expect(row.gb_per_s).toBeCloseTo((row.read_gb! * 1000) / row.tpot_ms.median!, 6);
      const [fastest, slowest] = [Math.min, Math.max].map((of) => of(...row.tpot_ms.samples.map(Number)));
      const shareOf = (ms: number, reading: number) => (row.read_gb! * 1000) / ms / reading;
      expect(row.share_of_bandwidth).toBeGreaterThanOrEqual(shareOf(slowest!, best!));
      expect(row.share_of_bandwidth).toBeLessThanOrEqual(
        shareOf(fastest!, Math.min(...readings.map(Number))),
      );
    }
    // A step must read at least the attention and dense weights and top-4 of 16 experts, at most all weights and cache.
    const weights = run.weight_bytes.reduce((sum, bytes) => sum + bytes, 0) / 1e9;
    expect(rows[0]!.read_gb!).toBeGreaterThan(weights / 8);
    expect(rows[1]!.read_gb!).toBeLessThan(weights * 1.2);
    expect(rows[1]!.read_gb!).toBeGreaterThan(rows[0]!.read_gb!);
    expect(rows[0]!.experts_read).toBe(6 * 4);
    expect(provenance.node).toBe(process.version);
  });

  it('measures each context from the position that it names, filled beyond a chunk of its prompt', async () => {
    const bench = DecodeBench.parse(
      await tpRunJson([...args, '--context', '8,300', '--prefill-chunk', '16', '--eager']),
    );
    expect(bench.run.eager).toBe(true);
    const seen = bench.rows.map(({ context, batch, filled }) => ({ context, batch, filled }));
    expect(seen).toEqual([
      { context: 8, batch: 1, filled: 0 },
      { context: 8, batch: 3, filled: 0 },
      { context: 300, batch: 1, filled: 284 },
      { context: 300, batch: 3, filled: 284 },
    ]);
    expect(bench.rows[2]!.read_gb!).toBeGreaterThan(bench.rows[0]!.read_gb!); // the cache is read
  });

  it('says where the time goes, stage by stage, and writes a trace of it', async () => {
    const trace = join(tempDir(), 'trace.json');
    const run = [...args, '--trace', trace];
    const { rows } = DecodeBench.parse(await tpRunJson(run));
    for (const { stages, read_gb } of rows) {
      const { steps, stages_us, gaps_us, outside_us, step_us, sync_us } = stages!;
      expect(steps).toBe(8);
      expect(stages_us! + gaps_us! + outside_us!).toBeCloseTo(step_us!, 6);
      expect(outside_us!).toBeGreaterThan(0);
      expect(sync_us!).toBeGreaterThan(0);
      const sum = (of: (row: NonNullable<typeof stages>['rows'][number]) => number) =>
        stages!.rows.reduce((all, row) => all + of(row), 0);
      expect(sum((row) => row.calls!)).toBe(6 * 9 + 4);
      expect(sum((row) => row.us_per_token!)).toBeCloseTo(stages_us!, 6);
      expect((2 * sum((row) => row.read_bytes!)) / 1e9).toBeCloseTo(read_gb!, 9);
      expect(new Set(stages!.rows.map(({ kind }) => kind))).toEqual(new Set(['head', 'sliding', 'full']));
    }
    const { traceEvents } = JSON.parse(readFileSync(trace, 'utf8')) as { traceEvents: TraceEvent[] };
    expectNesting(traceEvents);
    const events = timedOf(traceEvents);
    for (const pid of [0, 1]) {
      const steps = events.filter((event) => event.pid === pid && event.name.startsWith('step'));
      expect(steps).toHaveLength(5);
      for (const step of steps) {
        const within = events.filter((event) => event.pid === pid && event !== step && inside(event, step));
        expect(within).toHaveLength(6 * 9 + 4);
      }
      expect(events.filter((event) => event.pid === pid)).toHaveLength(5 * (1 + 6 * 9 + 4));
    }
  });

  it('refuses a place for the trace that cannot be written', async () => {
    const { code, stderr } = await tpRun([...args, '--trace', '/nowhere/trace.json']);
    expect(stderr).toMatch(/^TP_FILE_UNWRITABLE: \/nowhere\/trace.json/m);
    expect(code).toBe(2);
  });

  it('refuses a context and steps beyond what the model can hold', async () => {
    const { code, stderr } = await tpRun([...args, '--context', '4096']);
    expect(stderr).toMatch(/^TP_PROMPT_LENGTH: --context has 4096 tokens and 11 more are wanted/m);
    expect(code).toBe(2);
  });
});

describe('bench moe', () => {
  it.runIf(gpuNames().length === 0)('needs a GPU and says so', async () => {
    const { code, stderr } = await tpRun(['bench', 'moe', '--tokens', '1,16', '--variant', 'auto']);
    expect(stderr).toMatch(/^TP_DEVICE: /m);
    expect(code).toBe(2);
  });

  it.runIf(gpuNames().length > 0)('times the experts of a layer by every variant', async () => {
    const args = [
      'bench',
      'moe',
      '--model',
      'configs/gemma-4-26b-a4b.json',
      '--gpus',
      '2',
      '--tokens',
      '2,16',
    ];
    const { rows, tp, width } = MoeBench.parse(await tpRunJson([...args, '--iterations', '5']));
    expect([tp, width]).toEqual([2, 352]);
    expect(rows.map(({ tokens, variant }) => `${tokens} ${variant}`)).toEqual(
      [2, 16].flatMap((tokens) => MOE_VARIANTS.map((variant) => `${tokens} ${variant}`)),
    );
    for (const row of rows) {
      expect(row.time_us.samples).toHaveLength(5);
      expect(row.gb_per_s).toBeCloseTo((row.read_mb! * 1000) / row.time_us.median!, 6);
      expect(row.distance).toBeLessThan(row.variant === 'published' ? 1e-2 : 2e-3); // its activations are not rounded
    }
  });

  it('refuses a number of ranks that the experts cannot be split over', async () => {
    const { code, stderr } = await tpRun(['bench', 'moe', '--gpus', '3']);
    expect(stderr).toMatch(/^TP_SHARD_UNEVEN: /m);
    expect(code).toBe(2);
  });
});

describe('bench allreduce', () => {
  it.each(['2', '4'])(
    'times sums of %s ranks in the columns of nccl-tests and finds none wrong',
    async (gpus) => {
      const args = [
        'bench',
        'allreduce',
        ...cpu,
        '--gpus',
        gpus,
        '--sizes',
        '1,2816,5632',
        '--iterations',
        '20',
      ];
      const { code, stdout } = await tpRun(args);
      expect(code).toBe(0);
      expect(stdout).toMatch(/^ *size +count +type +redop +time +algbw +busbw +#wrong +p10 +p90 +p99$/m);
      const { rows } = AllReduceBench.parse(await tpRunJson(args));
      expect(rows.map(({ bytes, count, launch, wrong }) => ({ bytes, count, launch, wrong }))).toEqual([
        { bytes: 4, count: 1, launch: 'host', wrong: 0 },
        { bytes: 11264, count: 2816, launch: 'host', wrong: 0 },
        { bytes: 22528, count: 5632, launch: 'host', wrong: 0 },
      ]);
      const [, row] = rows;
      expect(row!.time_us.samples).toHaveLength(20);
      expect(row!.algbw_gb_per_s).toBeCloseTo(11264 / 1e3 / row!.time_us.median!, 6);
      expect(row!.busbw_gb_per_s! / row!.algbw_gb_per_s!).toBeCloseTo(
        (2 * (Number(gpus) - 1)) / Number(gpus),
        6,
      );
    },
  );

  it('measures the sizes that decoding uses when none are named', async () => {
    const { rows } = AllReduceBench.parse(
      await tpRunJson(['bench', 'allreduce', ...cpu, '--gpus', '2', '--iterations', '2', '--warmup', '0']),
    );
    expect(rows.map(({ count }) => count)).toEqual([2816, 5632, 11264, 22528, 45056]);
  });
});

describe('doctor', () => {
  it('says that tp-run can run here, and what auto would choose', async () => {
    const { can_run, findings } = DoctorResult.parse(
      await tpRunJson(['doctor', '--gpus', '2', '--device', 'cpu']),
    );
    expect(can_run).toBe(true);
    const text = Object.fromEntries(findings.map(({ what, text }) => [what, text]));
    expect(text).toMatchObject({ node: expect.stringContaining(process.version), device: 'cpu' });
    expect(text.collective).toMatch(/^zmq /);
    expect(text.cuda).toMatch(/^(not )?compiled with CUDA/);
    expect(text.zeromq).toMatch(/^libzmq 4\..*curve/);
  });

  it('exits with 2 and names what is missing', async () => {
    const { code, stdout } = await tpRun(['doctor', '--gpus', '2'], { TMPDIR: '/nowhere' });
    expect(stdout).toMatch(/^fail +temporary folder +.*\/nowhere/m);
    expect(stdout).toMatch(/^tp-run cannot run here/m);
    expect(code).toBe(2);
  });
});

describe('export', () => {
  it('writes a checkpoint that decodes like the config file it came from', async () => {
    const dir = join(tempDir(), 'model');
    expect((await tpRun(['export', dir, '--seed', '3'])).stdout).toBe(`${dir}\n`);
    const decode = [
      '--device',
      'cpu',
      '--prompt-ids',
      '2,3,5',
      '--max-tokens',
      '6',
      '--ignore-eos',
      '--gpus',
      '2',
    ];
    const [made, exported] = [
      await tpRun([...decode, '--seed', '3']),
      await tpRun([...decode, '--model', dir]),
    ];
    expect(made.stdout).toMatch(/^\d+( \d+){5}\n$/);
    expect(exported.stdout).toBe(made.stdout);
  });
});
