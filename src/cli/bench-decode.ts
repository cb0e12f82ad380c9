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

/** Length of one measurement of the read bandwidth; one stands before and one behind each batch size. */
const BANDWIDTH_S = 0.5;
/** Steps in a trace: enough to see what repeats, few enough to open. */
const TRACED_STEPS = 5;

type Row = DecodeBench['rows'][number];
/** A row, and what is known only when all are measured: the bandwidth that its stages are laid beside. */
interface Measured {
  row: Omit<Row, 'share_of_bandwidth' | 'stages'>;
  /** Of each rank, for every timed step; [] unless asked for. */
  times: StepTimes[][];
}

export async function benchDecode(options: Options): Promise<number> {
  requireOut(options);
  const { batchSize, context, steps, warmup, prefillChunk } = options;
  const model = openModel(options.model, options.seed);
  const { config } = model;
  const tokens = warmup + steps + 1; // the prompt's own step gives the first
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
        const shape = { prompts: prompts.slice(0, batch), filled, tokens, warmup };
        const row = rowOf(await decodeSteps(run, { ...shape, timeStages: false }), shape);
        const times = timed ? timesOf(await decodeSteps(run, { ...shape, timeStages: true }), warmup) : [];
        measured.push({ row, times });
        bandwidths.push(await readBandwidth(run));
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
        share_of_bandwidth: row.gb_per_s! / bandwidth,
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

/** What is decoded for one row: a batch of prompts of one length, `tokens` for each, the first `warmup` steps not counted. */
interface Shape {
  prompts: readonly number[][];
  /** Positions of each prompt that hold made-up keys and values. */
  filled: number;
  tokens: number;
  warmup: number;
}

/** All steps of one decoding. */
async function decodeSteps(
  run: Run,
  { prompts, filled, tokens, timeStages }: Shape & { timeStages: boolean },
): Promise<MergedStep[]> {
  const all: MergedStep[] = [];
  await run.execute(
    {
      kind: 'generate',
      sequences: prompts.map((promptIds, sequence) => ({ promptIds, maxTokens: tokens, sequence, filled })),
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

function rowOf(all: readonly MergedStep[], { prompts, filled, warmup }: Shape): Measured['row'] {
  const steps = counted(all, warmup);
  const stepMs = ({ time }: MergedStep) => time.computeMs + time.syncMs + time.hostMs;
  const ms = steps.map(stepMs);
  const prefill = all.filter(({ kind }) => kind === 'prefill');
  const readBytes = mean(steps.map(({ ranks }) => ranks.reduce((sum, rank) => sum + rank.readBytes, 0)));
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
