// `tp-run bench allreduce`: time of a sum over all ranks at the sizes that decoding uses, in the columns of nccl-tests.

import type { AllReduceReport, RunSpec } from '../engine/job.js';
import { EXIT } from '../errors.js';
import { log } from '../log.js';
import { provenance } from '../report/provenance.js';
import type { AllReduceBench } from '../report/schema.js';
import { quantiles } from '../report/stats.js';
import { short, table } from '../report/table.js';
import { chooseDevice } from './device.js';
import { openModel } from './model.js';
import { type Options, ranksOf } from './options.js';
import { print, printJson, requireOut, writeResult } from './output.js';
import { withRun } from './session.js';
import { runSpec } from './spec.js';

export async function benchAllReduce(options: Options): Promise<number> {
  requireOut(options);
  const ranks = ranksOf(options);
  const model = openModel(options.model, options.seed);
  const chosen = chooseDevice(options);
  const needs = { ranks, sequences: 1, positions: 1, everyRow: false, candidates: 1, trace: false };
  const spec = withRoom(runSpec(options, model, chosen, needs), 2 * model.config.hiddenSize, options.sizes);
  if (chosen.line) log.info(chosen.line);

  const result = await withRun(options, spec, async ({ run, facts }): Promise<AllReduceBench> => {
    const { sizes, iterations, warmup } = options;
    const results = await run.execute({ kind: 'allreduce', floats: [...sizes], warmup, iterations });
    const reports = results.map((said) => (said.kind === 'allreduce' ? said.sizes : []));
    return {
      schema: 'tp-run/bench-allreduce/1',
      rows: reports[0]!.map((_, i) => rowOf(reports.map((sizes) => sizes[i]!))),
      run: facts,
      provenance: provenance(),
    };
  });
  writeResult(options, result);
  if (options.json) printJson(result);
  else print(benchTable(result));
  return EXIT.ok;
}

/** A device collective has room for the longest message of a step, `width` floats a token: the longest one measured must fit. */
function withRoom(spec: RunSpec, width: number, sizes: readonly number[]): RunSpec {
  if (spec.device === 'cpu') return spec;
  const tokens = Math.max(spec.limits.tokens, Math.ceil(Math.max(...sizes) / width));
  return { ...spec, limits: { ...spec.limits, tokens } };
}

/** An iteration takes as long as its slowest rank. */
function rowOf(ranks: readonly AllReduceReport[]): AllReduceBench['rows'][number] {
  const { floats, launch } = ranks[0]!;
  const samples = ranks[0]!.timesUs.map((_, i) => Math.max(...ranks.map(({ timesUs }) => timesUs[i]!)));
  const time = quantiles(samples);
  const bytes = floats * 4;
  const algbw = bytes / 1e3 / time.median;
  return {
    bytes,
    count: floats,
    type: 'float',
    redop: 'sum',
    launch,
    time_us: { ...time, samples },
    algbw_gb_per_s: algbw,
    // the share of the data that must cross a link, as nccl-tests counts it
    busbw_gb_per_s: (algbw * 2 * (ranks.length - 1)) / ranks.length,
    wrong: ranks.reduce((sum, { wrong }) => sum + wrong, 0),
  };
}

const LAUNCHED = {
  host: '',
  stream: 'launched one by one, a sample is the mean of 32:\n',
  graph: 'in a CUDA graph, a sample is the mean of 256:\n',
} as const;

function benchTable({ rows, run, provenance }: AllReduceBench): string {
  const { cpu, cores, node, commit, dirty } = provenance;
  const tables = (['host', 'stream', 'graph'] as const).map((launch) => {
    const some = rows.filter((row) => row.launch === launch);
    return some.length ? `${LAUNCHED[launch]}${columns(some)}` : '';
  });
  return (
    `${run.tp} ranks, collective ${run.collective_why}\n` +
    `${cpu}, ${cores} cores, node ${node}, commit ${commit}${dirty ? '+' : ''}\n${tables.join('')}`
  );
}

/** The columns of nccl-tests, and how far the times spread. */
function columns(rows: AllReduceBench['rows']): string {
  const lines = rows.map((row) => {
    const { median, p10, p90, p99 } = row.time_us;
    const rates = [row.algbw_gb_per_s, row.busbw_gb_per_s].map((rate) => rate!.toFixed(3));
    return [
      ...[`${row.bytes}`, `${row.count}`, row.type, row.redop, short(median!), ...rates, `${row.wrong}`],
      ...[p10, p90, p99].map((us) => short(us!)),
    ];
  });
  const units = ['(B)', '(elements)', '', '', '(us)', '(GB/s)', '(GB/s)', '', '(us)', '(us)', '(us)'];
  const names = ['size', 'count', 'type', 'redop', 'time', 'algbw', 'busbw', '#wrong', 'p10', 'p90', 'p99'];
  return table(names, [units, ...lines]);
}
