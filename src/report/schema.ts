// The JSON that commands print: one schema per result, named in its `schema` field.

import { z } from 'zod';

/** JSON has no NaN and no infinities: they are written as null. */
const real = z.number().nullable();
const count = z.int().nonnegative();
const samples = z.array(real);

export const RunFacts = z.strictObject({
  tp: count,
  device: z.enum(['cpu', 'cuda']),
  collective: z.string(),
  collective_why: z.string(),
  dtype: z.enum(['bfloat16', 'float32']),
  model: z.string(),
  weights_seed: count.nullable(),
  threads: count,
  isa: z.string(),
  /** No CUDA graphs. */
  eager: z.boolean(),
  sequences: count,
  load_s: real,
  /** Milliseconds of each stage up to readiness, on the rank that took longest. */
  stage_ms: z.record(z.string(), real),
  weight_bytes: z.array(count),
  cache_bytes: z.array(count),
});
export type RunFacts = z.infer<typeof RunFacts>;

export const Provenance = z.strictObject({
  version: z.string(),
  commit: z.string().nullable(),
  dirty: z.boolean().nullable(),
  node: z.string(),
  addon: z.string(),
  cuda: z.string().nullable(),
  host: z.string(),
  os: z.string(),
  cpu: z.string(),
  cores: count,
  memory_gb: z.number(),
  time: z.string(),
});
export type Provenance = z.infer<typeof Provenance>;

/** Milliseconds of an average decode step, on rank 0. */
const Shares = z.strictObject({ compute: real, sync: real, host: real }).nullable();

export const GenerateResult = z.strictObject({
  schema: z.literal('tp-run/generate/1'),
  results: z.array(
    z.strictObject({
      prompt_ids: z.array(count),
      token_ids: z.array(count),
      text: z.string().nullable(),
      logprobs: samples,
      finish_reason: z.enum(['length', 'stop']),
    }),
  ),
  timing: z.strictObject({
    load_s: real,
    prefill_ms: real,
    tpot_ms: z.strictObject({ median: real, p90: real, samples }),
    shares_ms: Shares,
  }),
  run: RunFacts,
});
export type GenerateResult = z.infer<typeof GenerateResult>;

export const ScoreResult = z.strictObject({
  schema: z.literal('tp-run/score/1'),
  /** One log-probability per prompt token; the first has nothing before it. */
  results: z.array(z.strictObject({ prompt_ids: z.array(count), token_logprobs: samples })),
  timing: z.strictObject({ load_s: real, prefill_ms: real }),
  run: RunFacts,
});
export type ScoreResult = z.infer<typeof ScoreResult>;

const Difference = z.strictObject({
  sequence: count,
  position: count,
  layer: z.int(),
  stage: z.string(),
  what: z.enum(['output', 'logits', 'token', 'missing']),
});

export const AxisResult = z.strictObject({
  axis: z.enum(['tp', 'batch', 'repeat']),
  /** What was laid beside what. */
  name: z.string(),
  equal: z.boolean(),
  compared: z.strictObject({ tokens: count, rows: count, values: count, outputs: count }),
  differing: z.strictObject({ sequences: count, cells: count }),
  first: Difference.nullable(),
  distance: z.strictObject({ maxDelta: real, maxUlp: count, topFlips: count }).nullable(),
  /** The run ended because its ranks disagreed among themselves. */
  disagreement: z.string().nullable(),
});
export type AxisResult = z.infer<typeof AxisResult>;

export const CheckResult = z.strictObject({
  schema: z.literal('tp-run/check/1'),
  verdict: z.enum(['pass', 'fail', 'control-missed']),
  line: z.string(),
  level: z.enum(['tokens', 'logits', 'layers']),
  prompts: count,
  max_tokens: count,
  axes: z.array(AxisResult),
  /** One unit in the last place planted on one side; null when a run could not go on so far. */
  control: z
    .strictObject({
      planted: Difference.omit({ what: true }).extend({ rank: z.int().min(-1) }),
      found: Difference.nullable(),
      detected: z.boolean(),
    })
    .nullable(),
  run: RunFacts,
  provenance: Provenance,
});
export type CheckResult = z.infer<typeof CheckResult>;

/** Where an average decode step goes on one rank, in us: stages, gaps and what is outside make up the step. */
export const StageReport = z.strictObject({
  /** Timed ones, each rank's; decoded one by one, without a CUDA graph. */
  steps: count,
  rows: z.array(
    z.strictObject({
      stage: z.string(),
      kind: z.enum(['sliding', 'full', 'head']),
      /** Of the stage for one token of every sequence. */
      calls: real,
      /** Median of one call. */
      us: real,
      us_per_token: real,
      /** From the end of the stage before until all inputs are there; only resident stages tell. */
      wait_us_per_token: real,
      /** Between the end of what ran before and the begin: the way to the host and back. */
      gap_us_per_token: real,
      read_bytes: real,
      gb_per_s: real,
      /** Of one rank's part of read_bandwidth_gb_per_s. */
      share_of_bandwidth: real,
      /** Of the step. */
      share: real,
    }),
  ),
  stages_us: real,
  gaps_us: real,
  /** Before the first stage, behind the last, and whatever nothing explains. */
  outside_us: real,
  step_us: real,
  /** Sums and gathers between ranks, waiting for the other ranks included. */
  sync_us: real,
});
export type StageReport = z.infer<typeof StageReport>;

export const DecodeBench = z.strictObject({
  schema: z.literal('tp-run/bench-decode/2'),
  rows: z.array(
    z.strictObject({
      batch: count,
      /** Position of the first measured token, and how many positions before it hold made-up keys and values. */
      context: count,
      filled: count,
      steps: count,
      tpot_ms: z.strictObject({ median: real, p10: real, p90: real, p99: real, min: real, samples }),
      tokens_per_s: real,
      prefill_ms: real,
      /** Weight and cache bytes that all ranks had to read for one step, in GB, and the rate that makes. */
      read_gb: real,
      experts_read: real,
      gb_per_s: real,
      /** The same of the better reading beside each round; median of the rounds. */
      share_of_bandwidth: real,
      shares_ms: Shares,
      stages: StageReport.nullable(),
    }),
  ),
  /** The best of streaming reads by all ranks at once, in the same processes, before and behind each round. */
  read_bandwidth_gb_per_s: real,
  read_bandwidth_samples: samples,
  run: RunFacts,
  provenance: Provenance,
});
export type DecodeBench = z.infer<typeof DecodeBench>;

export const AllReduceBench = z.strictObject({
  schema: z.literal('tp-run/bench-allreduce/1'),
  rows: z.array(
    z.strictObject({
      bytes: count,
      count: count,
      type: z.literal('float'),
      redop: z.literal('sum'),
      /** By the host; one by one on the device's stream; many in one CUDA graph. */
      launch: z.enum(['host', 'stream', 'graph']),
      /** The slowest rank's time of each iteration. */
      time_us: z.strictObject({ median: real, p10: real, p90: real, p99: real, min: real, samples }),
      algbw_gb_per_s: real,
      busbw_gb_per_s: real,
      wrong: count,
    }),
  ),
  run: RunFacts,
  provenance: Provenance,
});
export type AllReduceBench = z.infer<typeof AllReduceBench>;

export const GpuReport = z.strictObject({
  driver: z.string().nullable(),
  /** Newest CUDA that the driver runs. */
  cuda: z.string().nullable(),
  /** "2.28.9 (/usr/lib/...)" */
  nccl: z.string().nullable(),
  devices: z.array(
    z.strictObject({
      index: count,
      name: z.string(),
      compute_capability: z.string(),
      free_bytes: count,
      total_bytes: count,
      pci: z.string(),
      /** Active ones; null = not known. */
      nvlinks: count.nullable(),
      /** Other processes can open its memory. */
      ipc: z.boolean(),
      /** All measured GPUs read at the same time. */
      read_gb_per_s: real,
    }),
  ),
  links: z.array(z.strictObject({ from: count, to: count, access: z.boolean(), atomics: z.boolean() })),
  all_reduce: z.array(
    z.strictObject({
      collective: z.string(),
      launch: z.enum(['host', 'stream', 'graph']),
      bytes: count,
      median_us: real,
      wrong: count,
    }),
  ),
  not_measured: z.array(z.strictObject({ what: z.string(), why: z.string() })),
});
export type GpuReport = z.infer<typeof GpuReport>;

export const MoeBench = z.strictObject({
  schema: z.literal('tp-run/bench-moe/1'),
  gpu: z.string(),
  /** Of a kernel that only reads, on the same weights. */
  read_gb_per_s: real,
  /** The shape is one rank's of so many. */
  tp: count,
  hidden: count,
  width: count,
  experts: count,
  top_k: count,
  rows: z.array(
    z.strictObject({
      tokens: count,
      variant: z.enum(['published', 'grouped', 'auto']),
      time_us: z.strictObject({ median: real, p10: real, p90: real, p99: real, min: real, samples }),
      /** Distinct experts that a block reads, their bytes, and what reading them must take. */
      experts_read: real,
      read_mb: real,
      gb_per_s: real,
      floor_us: real,
      /** Of the output from auto's, relative. */
      distance: real,
    }),
  ),
  provenance: Provenance,
});
export type MoeBench = z.infer<typeof MoeBench>;

export const DoctorResult = z.strictObject({
  schema: z.literal('tp-run/doctor/1'),
  can_run: z.boolean(),
  findings: z.array(
    z.strictObject({
      what: z.string(),
      /** fail: tp-run cannot run here */
      status: z.enum(['ok', 'note', 'fail']),
      text: z.string(),
    }),
  ),
  /** null where no GPU can be used. */
  gpus: GpuReport.nullable(),
});
export type DoctorResult = z.infer<typeof DoctorResult>;
