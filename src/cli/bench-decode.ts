// `tp-run bench decode`: time per token, the bytes it had to read, and how much of this machine's read bandwidth that is;
// with `--stages` where in the step the time goes.

import type { JobResult } from '../engine/job.js';
import type { Run } from '../engine/launcher.js';
import type { MergedStep } from '../engine/merge.js';
import { EXIT, fail } from '../errors.js';
import { log } from '../log.js';
import { provenance } from '../report/provenance.js';
import type { DecodeBench } from '../report/schema.js';
import { type StepTimes, stageReport, stageTable } from '../report/stages.js';
import { mean, quantiles } from '../report/stats.js';
import { percent, short, table } from '../report/table.js';
import { chromeTrace } from '../report/trace.js';
import { chooseDevice } from './device.js';
import { randomPrompts } from './made-prompts.js';
import { openModel } from './model.js';
import { type Options, ranksOf } from './options.js';
import { print, printJson, requireOut, writeOut, writeResult } from './output.js';
import { withRun } from './session.js';
import { runSpec } from './spec.js';
import { stagePlaces } from './stage-places.js';

/** Length of one measurement of the read bandwidth; one stands before and one behind each round. */
const BANDWIDTH_S = 0.5;
/** In which the steps of a row are measured on the CPU: what the neighbours on a host leave of its memory changes from one
 * second to the next, so a step is laid beside a reading of its own time. One where stages are timed, of the same steps. */
const CPU_ROUNDS = 5;
/** Steps in a trace: enough to see what repeats, few enough to open. */
const TRACED_STEPS = 5;

type Row = DecodeBench['rows'][number];
/** A row, and what is known only when all are measured: the bandwidth that its stages are laid beside. */
interface Measured {
  row: Omit<Row, 'stages'>;
  /** Of each rank, for every timed step; [] unless asked for. */
  times: StepTimes[][];
}

export async function benchDecode(options: Options): Promise<number> {
  requireOut(options);
  const { batchSize, context, steps, warmup, prefillChunk } = options;
  const model = openModel(options.model, options.seed);
  const { config } = model;
  const tokens = tokensOf(warmup, steps);
  const limit = options.maxModelLen ?? config.maxPositions;
  const longest = Math.max(...context);
  if (longest + tokens > limit)
    throw fail('TP_PROMPT_LENGTH', '--context', longest, tokens, limit, 'of the run');
  const chosen = chooseDevice(options);
  const sequences = Math.max(...batchSize);
  const spec = runSpec(options, model, chosen, {
    ranks: ranksOf(options),
    sequences,
    positions: longest + tokens,
    everyRow: false,
    candidates: 1,
    trace: false,
  });
  if (chosen.line) log.info(chosen.line);
  const places = stagePlaces(config);
  const timed = options.stages || options.trace !== null;

  const result = await withRun(options, spec, async ({ run, facts }): Promise<DecodeBench> => {
    const bandwidths = [await readBandwidth(run)];
    const measured: Measured[] = [];
    for (const length of context) {
      const prompts = randomPrompts(config, Array(sequences).fill(length));
      const filled = Math.max(0, length - prefillChunk);
      for (const batch of batchSize) {
        const shape = { prompts: prompts.slice(0, batch), filled, warmup };
        const rounds: Round[] = [];
        for (const some of parts(steps, chosen.device === 'cpu' && !timed ? CPU_ROUNDS : 1)) {
          const before = bandwidths.at(-1)!;
          const all = await decodeSteps(run, { ...shape, steps: some, timeStages: false });
          bandwidths.push(await readBandwidth(run));
          rounds.push({ all, bandwidth: Math.max(before, bandwidths.at(-1)!) });
        }
        const row = rowOf(rounds, shape);
        const times = timed
          ? timesOf(await decodeSteps(run, { ...shape, steps, timeStages: true }), warmup)
          : [];
        measured.push({ row, times });
      }
    }
    const bandwidth = Math.max(...bandwidths); // what the memory can give; noise only takes away
    if (options.trace !== null) {
      const ranks = measured[0]!.times.map((steps, rank) => ({
        ...{ rank, host: run.ranks[rank]!.host },
        steps: steps.slice(0, TRACED_STEPS),
      }));
      writeOut(options.trace, `${JSON.stringify(chromeTrace(places, ranks))}\n`);
    }
    return {
      schema: 'tp-run/bench-decode/2',
      rows: measured.map(({ row, times }) => ({
        ...row,
        stages: timed ? stageReport(places, times, bandwidth / facts.tp) : null,
      })),
      read_bandwidth_gb_per_s: bandwidth,
      read_bandwidth_samples: bandwidths,
      run: facts,
      provenance: provenance(),
    };
  });
  writeResult(options, result);
  if (options.json) printJson(result);
  else print(benchTable(result));
  return EXIT.ok;
}

/** GB/s of all ranks together, each streaming through its own weights. */
async function readBandwidth(run: Run): Promise<number> {
  const results = await run.execute({ kind: 'read-bandwidth', seconds: BANDWIDTH_S });
  return results.reduce(
    (sum, result: JobResult) => sum + (result.kind === 'read-bandwidth' ? result.gbPerS : 0),
    0,
  );
}

/** What is decoded for one row: a batch of prompts of one length, the first `warmup` steps not counted. */
interface Shape {
  prompts: readonly number[][];
  /** Positions of each prompt that hold made-up keys and values. */
  filled: number;
  warmup: number;
}

/** All steps of one decoding, and the better of the readings before and behind it, in GB/s: noise only takes away. */
interface Round {
  all: readonly MergedStep[];
  bandwidth: number;
}

/** The prompt's own step gives the first. */
const tokensOf = (warmup: number, steps: number) => warmup + steps + 1;

/** `total` in as many whole parts as there may be, none of them empty. */
function parts(total: number, most: number): number[] {
  const count = Math.min(total, most);
  return Array.from(
    { length: count },
    (_, i) => Math.floor(((i + 1) * total) / count) - Math.floor((i * total) / count),
  );
}

/** All steps of one decoding, `steps` of which count. */
async function decodeSteps(
  run: Run,
  { prompts, filled, warmup, steps, timeStages }: Shape & { steps: number; timeStages: boolean },
): Promise<MergedStep[]> {
  const all: MergedStep[] = [];
  const maxTokens = tokensOf(warmup, steps);
  await run.execute(
    {
      kind: 'generate',
      sequences: prompts.map((promptIds, sequence) => ({ promptIds, maxTokens, sequence, filled })),
      sampling: { temperature: 0, topK: 0, topP: 1, seed: 0 },
      stopTokenIds: [],
      keepLogits: false,
      timeStages,
      fault: null,
    },
    (step) => {
      all.push(step);
      log.progress(`context ${prompts[0]!.length}, batch ${prompts.length}: step ${all.length}`);
    },
  );
  log.progress('');
  return all;
}

const counted = (all: readonly MergedStep[], warmup: number) =>
  all.filter(({ kind }) => kind === 'decode').slice(warmup);

/** By rank, for every counted step. */
function timesOf(all: readonly MergedStep[], warmup: number): StepTimes[][] {
  const steps = counted(all, warmup);
  return steps[0]!.ranks.map((_, rank) => steps.map(({ ranks }) => ranks[rank]!.times!));
}

function rowOf(rounds: readonly Round[], { prompts, filled, warmup }: Shape): Measured['row'] {
  const steps = rounds.flatMap((round) => counted(round.all, warmup));
  const stepMs = ({ time }: MergedStep) => time.computeMs + time.syncMs + time.hostMs;
  const ms = steps.map(stepMs);
  const prefill = rounds[0]!.all.filter(({ kind }) => kind === 'prefill');
  const bytesOf = (some: readonly MergedStep[]) =>
    mean(some.map(({ ranks }) => ranks.reduce((sum, rank) => sum + rank.readBytes, 0)));
  const readBytes = bytesOf(steps);
  const shares = rounds.map((round) => {
    const some = counted(round.all, warmup);
    return bytesOf(some) / 1e6 / quantiles(some.map(stepMs)).median! / round.bandwidth;
  });
  const tpot = { ...quantiles(ms), samples: ms };
  return {
    batch: prompts.length,
    context: prompts[0]!.length,
    filled,
    steps: steps.length,
    tpot_ms: tpot,
    tokens_per_s: (prompts.length * 1000) / tpot.median,
    prefill_ms: prefill.reduce((sum, step) => sum + stepMs(step), 0),
    read_gb: readBytes / 1e9,
    experts_read: mean(steps.map(({ expertsRead }) => expertsRead)),
    gb_per_s: readBytes / 1e6 / tpot.median,
    share_of_bandwidth: quantiles(shares).median!,
    shares_ms: {
      compute: mean(steps.map(({ time }) => time.computeMs)),
      sync: mean(steps.map(({ time }) => time.syncMs)),
      host: mean(steps.map(({ time }) => time.hostMs)),
    },
  };
}

function benchTable({ rows, run, provenance, read_bandwidth_gb_per_s: bandwidth }: DecodeBench): string {
  const lines = rows.map((row) => {
    const { compute, sync, host } = row.shares_ms!;
    const total = compute! + sync! + host!;
    const { median, p10, p90, p99 } = row.tpot_ms;
    return [
      ...[`${row.context}`, `${row.batch}`],
      ...[median, p10, p90, p99, row.tokens_per_s, row.read_gb, row.gb_per_s].map((x) => short(x!)),
      percent(row.share_of_bandwidth!),
      ...[compute, sync, host].map((x) => percent(x! / total)),
    ];
  });
  const headings = [
    ...['context', 'batch', 'TPOT ms', 'p10', 'p90', 'p99', 'tokens/s', 'GB/step', 'GB/s', 'of bandwidth'],
    ...['compute', 'sync', 'host'],
  ];
  const { cpu, cores, node, commit, dirty } = provenance;
  const stages = rows.flatMap(({ context, batch, tpot_ms, stages }) =>
    stages
      ? [
          `\ncontext ${context}, batch ${batch}, one rank; sums between ranks ${short(stages.sync_us!)} us\n` +
            stageTable(stages, tpot_ms.median! * 1000),
        ]
      : [],
  );
  return (
    `tp=${run.tp} ${run.device} ${run.dtype}, ${run.threads} threads a rank, ${run.model}\n` +
    `${cpu}, ${cores} cores, read bandwidth ${short(bandwidth!)} GB/s, node ${node}, commit ${commit}${dirty ? '+' : ''}\n` +
    table(headings, lines) +
    stages.join('')
  );
}
