// `tp-run bench decode`: time per token, the bytes it had to read, and how much of this machine's read bandwidth that is.

import type { JobResult } from '../engine/job.js';
import type { Run } from '../engine/launcher.js';
import type { MergedStep } from '../engine/merge.js';
import { EXIT, fail } from '../errors.js';
import { log } from '../log.js';
import { provenance } from '../report/provenance.js';
import type { DecodeBench } from '../report/schema.js';
import { mean, quantiles } from '../report/stats.js';
import { percent, short, table } from '../report/table.js';
import { chooseDevice } from './device.js';
import { randomPrompts } from './made-prompts.js';
import { openModel } from './model.js';
import { type Options, ranksOf } from './options.js';
import { print, printJson, requireOut, writeResult } from './output.js';
import { withRun } from './session.js';
import { runSpec } from './spec.js';

/** Length of one measurement of the read bandwidth; one stands before and one behind each batch size. */
const BANDWIDTH_S = 0.5;

type Row = DecodeBench['rows'][number];

export async function benchDecode(options: Options): Promise<number> {
  requireOut(options);
  const { batchSize, context, steps, warmup } = options;
  const model = openModel(options.model, options.seed);
  const { config } = model;
  const tokens = warmup + steps + 1; // the prompt's own step gives the first
  const limit = options.maxModelLen ?? config.maxPositions;
  if (context + tokens > limit)
    throw fail('TP_PROMPT_LENGTH', '--context', context, tokens, limit, 'of the run');
  const chosen = chooseDevice(options);
  const sequences = Math.max(...batchSize);
  const spec = runSpec(options, model, chosen, {
    ranks: ranksOf(options),
    sequences,
    positions: context + tokens,
    everyRow: false,
    candidates: 1,
    trace: false,
  });
  if (chosen.line) log.info(chosen.line);
  const prompts = randomPrompts(config, Array(sequences).fill(context));

  const result = await withRun(options, spec, async ({ run, facts }): Promise<DecodeBench> => {
    const bandwidths = [await readBandwidth(run)];
    const measured: Omit<Row, 'share_of_bandwidth'>[] = [];
    for (const batch of batchSize) {
      measured.push(await measure(run, prompts.slice(0, batch), { context, steps, warmup, tokens }));
      bandwidths.push(await readBandwidth(run));
    }
    const bandwidth = Math.max(...bandwidths); // what the memory can give; noise only takes away
    return {
      schema: 'tp-run/bench-decode/1',
      rows: measured.map((row) => ({ ...row, share_of_bandwidth: row.gb_per_s! / bandwidth })),
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

async function measure(
  run: Run,
  prompts: readonly number[][],
  { context, steps, warmup, tokens }: { context: number; steps: number; warmup: number; tokens: number },
): Promise<Omit<Row, 'share_of_bandwidth'>> {
  const all: MergedStep[] = [];
  await run.execute(
    {
      kind: 'generate',
      sequences: prompts.map((promptIds, sequence) => ({ promptIds, maxTokens: tokens, sequence })),
      sampling: { temperature: 0, topK: 0, topP: 1, seed: 0 },
      stopTokenIds: [],
      keepLogits: false,
      fault: null,
    },
    (step) => {
      all.push(step);
      log.progress(`batch ${prompts.length}: step ${all.length}`);
    },
  );
  log.progress('');
  const measured = all.filter(({ kind }) => kind === 'decode').slice(warmup);
  const ms = measured.map(({ time }) => time.computeMs + time.syncMs + time.hostMs);
  const prefill = all.filter(({ kind }) => kind === 'prefill');
  const readBytes = mean(measured.map(({ ranks }) => ranks.reduce((sum, rank) => sum + rank.readBytes, 0)));
  const tpot = { ...quantiles(ms), samples: ms };
  return {
    batch: prompts.length,
    context,
    steps,
    tpot_ms: tpot,
    tokens_per_s: (prompts.length * 1000) / tpot.median,
    prefill_ms: prefill.reduce((sum, { time }) => sum + time.computeMs + time.syncMs + time.hostMs, 0),
    read_gb: readBytes / 1e9,
    experts_read: mean(measured.map(({ expertsRead }) => expertsRead)),
    gb_per_s: readBytes / 1e6 / tpot.median,
    shares_ms: {
      compute: mean(measured.map(({ time }) => time.computeMs)),
      sync: mean(measured.map(({ time }) => time.syncMs)),
      host: mean(measured.map(({ time }) => time.hostMs)),
    },
  };
}

function benchTable({ rows, run, provenance, read_bandwidth_gb_per_s: bandwidth }: DecodeBench): string {
  const lines = rows.map((row) => {
    const { compute, sync, host } = row.shares_ms!;
    const total = compute! + sync! + host!;
    const { median, p10, p90, p99 } = row.tpot_ms;
    return [
      `${row.batch}`,
      ...[median, p10, p90, p99, row.tokens_per_s, row.read_gb, row.gb_per_s].map((x) => short(x!)),
      percent(row.share_of_bandwidth!),
      ...[compute, sync, host].map((x) => percent(x! / total)),
    ];
  });
  const headings = [
    ...['batch', 'TPOT ms', 'p10', 'p90', 'p99', 'tokens/s', 'GB/step', 'GB/s', 'of bandwidth'],
    ...['compute', 'sync', 'host'],
  ];
  const { cpu, cores, node, commit, dirty } = provenance;
  return (
    `tp=${run.tp} ${run.device} ${run.dtype}, ${run.threads} threads a rank, context ${rows[0]?.context}, ${run.model}\n` +
    `${cpu}, ${cores} cores, read bandwidth ${short(bandwidth!)} GB/s, node ${node}, commit ${commit}${dirty ? '+' : ''}\n` +
    table(headings, lines)
  );
}
