// `tp-run bench moe`: time of the experts of one layer alone (gate and up, GELU * up, down, weighted sum), by the kernels of
// decoding and by two others, with uniformly random routing and weights that no cache holds.

import { EXIT, fail } from '../errors.js';
import { leavesOf, requireSplittable } from '../model/shard.js';
import { fromNative, MOE_VARIANTS, type MoeBenchResult, native } from '../native.js';
import { provenance } from '../report/provenance.js';
import type { MoeBench } from '../report/schema.js';
import { quantiles } from '../report/stats.js';
import { short, table } from '../report/table.js';
import { cudaObstacle } from './device.js';
import { openModel } from './model.js';
import type { Options } from './options.js';
import { print, printJson, requireOut, writeResult } from './output.js';

export async function benchMoe(options: Options): Promise<number> {
  requireOut(options);
  const { gpus, variant, tokens, iterations } = options;
  const { config } = openModel(options.model, options.seed);
  requireSplittable(config, gpus.count);
  const deviceIndex = gpus.devices?.[0] ?? 0; // one GPU plays one of the ranks
  const obstacle = cudaObstacle(deviceIndex + 1);
  if (obstacle) throw fail('TP_DEVICE', obstacle);
  const variants = variant === 'all' ? MOE_VARIANTS : [variant];
  const cases = tokens.flatMap((count) => variants.map((v) => ({ variant: v, tokens: count })));
  const shape = {
    hidden: config.hiddenSize,
    width: config.moeIntermediateSize / gpus.count,
    experts: config.numExperts,
    topK: config.topKExperts,
    leaves: leavesOf(config) / gpus.count,
  };
  const seed = options.seed ?? 0;
  const measured: MoeBenchResult = await native()
    .benchMoe({ deviceIndex, ...shape, cases, replays: iterations, seed })
    .catch((error: unknown) => {
      throw fromNative(error);
    });
  const result: MoeBench = {
    schema: 'tp-run/bench-moe/1',
    gpu: measured.gpu,
    read_gb_per_s: measured.readGbPerS,
    tp: gpus.count,
    hidden: shape.hidden,
    width: shape.width,
    experts: shape.experts,
    top_k: shape.topK,
    rows: measured.cases.map(({ us, experts, bytes, distance }, i) => {
      const samples = [...us];
      const time = quantiles(samples);
      return {
        ...cases[i]!,
        time_us: { ...time, samples },
        experts_read: experts,
        read_mb: bytes / 1e6,
        gb_per_s: bytes / 1e3 / time.median,
        floor_us: bytes / 1e3 / measured.readGbPerS,
        distance,
      };
    }),
    provenance: provenance(),
  };
  writeResult(options, result);
  if (options.json) printJson(result);
  else print(benchTable(result));
  return EXIT.ok;
}

function benchTable({ rows, provenance, ...bench }: MoeBench): string {
  const lines = rows.map((row) => [
    `${row.tokens}`,
    row.variant,
    ...[row.time_us.median!, row.time_us.p10!, row.time_us.p90!].map(short),
    ...[row.experts_read!, row.read_mb!, row.gb_per_s!, row.floor_us!].map(short),
    (row.time_us.median! / row.floor_us!).toFixed(2),
    row.distance!.toExponential(1),
  ]);
  const headings = [
    ...['tokens', 'variant', 'us', 'p10', 'p90', 'experts', 'MB', 'GB/s', 'floor us'],
    ...['x floor', 'distance'],
  ];
  const { node, commit, dirty } = provenance;
  return (
    `${bench.experts} experts of ${bench.width} columns (tp=${bench.tp}), ${bench.top_k} a token, hidden size ${bench.hidden}\n` +
    `${bench.gpu}, read bandwidth ${short(bench.read_gb_per_s!)} GB/s, node ${node}, commit ${commit}${dirty ? '+' : ''}\n` +
    table(headings, lines)
  );
}
