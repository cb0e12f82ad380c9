// What a run is asked to do and what every rank answers: the words that launcher, rank and commands share.
// Plain data: jobs and reports cross processes as msgpack, arrays of numbers as raw frames.

import type { Device, Dtype, Fault, Isa, TraceEntry } from '../native.js';
import type { StepTimes } from '../report/stages.js';

/** Where the weights come from. */
export type ModelSource =
  /** a Hugging Face checkpoint folder */
  | { kind: 'checkpoint'; dir: string }
  /** a file of configs/ : weights are a pure function of the seed */
  | { kind: 'synthetic'; file: string; seed: number };

/** The folder or file that it is read from. */
export function nameOf(model: ModelSource): string {
  return model.kind === 'checkpoint' ? model.dir : model.file;
}

/** Everything a run needs to start; frozen by the command line, carried to every worker. */
export interface RunSpec {
  model: ModelSource;
  /** Ranks = TP degree. */
  ranks: number;
  /** `cpu`, or `cuda` with one device index per rank. */
  device: Device;
  devices: readonly number[];
  dtype: Dtype;
  collective: 'auto' | 'peer' | 'nccl' | 'zmq';
  isa: Isa;
  /** Compute threads of one rank. */
  threads: number;
  limits: {
    tokens: number; // most tokens in one step: the prefill chunk, or the batch if larger
    rows: number; // most rows with logits in one step
    sequences: number; // sequences decoded together
    positions: number; // longest prompt + its new tokens
    candidates: number; // candidates per virtual vocabulary shard, see sampler.ts
  };
  trace: boolean;
  /** No CUDA graphs: every kernel is launched by itself. */
  eager: boolean;
  initTimeoutMs: number;
  stepTimeoutMs: number;
  logDir: string | null;
}

export interface Sampling {
  temperature: number; // 0 = greedy
  topK: number; // 0 = all
  topP: number; // 1 = all
  seed: number;
}

export interface SequenceSpec {
  promptIds: number[];
  maxTokens: number;
  /** Key of its random stream; its place in the command's list of prompts. */
  sequence: number;
  /**
   * How many of the last `promptIds` an earlier run has decoded, 0 unless said: they go through the path that made them,
   * one at a time, because a GPU may round a prompt's chunk differently.
   */
  replay?: number | undefined;
  /**
   * How many of the first `promptIds` no step works on, 0 unless said: made-up keys and values stand in the cache for them.
   * For measurements.
   */
  filled?: number | undefined;
}

/** A fault planted for check's negative control. */
export interface PlantedFault extends Omit<Fault, 'slot'> {
  /** -1 = on every rank: the only way for a stage whose output every rank holds, which must stay equal on all. */
  rank: number;
  sequence: number;
}

export interface GenerateJob {
  kind: 'generate';
  sequences: SequenceSpec[];
  sampling: Sampling;
  /** [] = never stop before maxTokens. */
  stopTokenIds: number[];
  /** Send the logits row of every generated token. */
  keepLogits: boolean;
  /** Time every stage of every step, false unless said; steps go one by one then. */
  timeStages?: boolean | undefined;
  fault: PlantedFault | null;
}

/** Teacher-forced: a logits row and the next token's log-probability for every prompt token. */
export interface ScoreJob {
  kind: 'score';
  sequences: SequenceSpec[]; // maxTokens 0
  keepLogits: boolean;
  fault: PlantedFault | null;
}

/**
 * All-reduce of `floats[i]` fp32 values, `warmup` + `iterations` times each; also checks the sums exactly. A device
 * collective is timed in every way that it can be launched.
 */
export interface AllReduceJob {
  kind: 'allreduce';
  floats: number[];
  warmup: number;
  iterations: number;
}

/** Streams through each rank's own weights, all ranks at once. */
export interface ReadBandwidthJob {
  kind: 'read-bandwidth';
  seconds: number;
}

export type Job = GenerateJob | ScoreJob | AllReduceJob | ReadBandwidthJob;

/** One logits row of a step. */
export interface RowReport {
  sequence: number;
  /** Position of the token that made this row. */
  position: number;
  /** Sampled token (generate), -1 for score rows. */
  token: number;
  logprob: number;
  /** Log-probability of the prompt's next token (score), null where there is none. */
  targetLogprob: number | null;
  finish: 'length' | 'stop' | null;
}

/** What one rank says of one step. Rows must be equal on all ranks: a difference is fatal (TP_RANKS_DISAGREE). */
export interface StepReport {
  step: number;
  kind: 'prefill' | 'decode';
  /** (sequence, position) of every token of the step, in order. */
  tokens: { sequence: number; position: number }[];
  rows: RowReport[];
  time: { computeMs: number; syncMs: number; hostMs: number };
  /** Bytes of weights and cache that the step had to read on this rank, and its distinct (layer, expert) pairs. */
  readBytes: number;
  expertsRead: number;
  /** This rank's part of the logits, [rows, vocab / ranks]; null unless kept. */
  logits: Float32Array | null;
  trace: TraceEntry[] | null;
  /** null unless timed. */
  times: StepTimes | null;
}

export interface AllReduceReport {
  floats: number;
  /** Called by the host one after the other; queued one by one on the device; recorded in one CUDA graph. */
  launch: 'host' | 'stream' | 'graph';
  /** Microseconds of each timed iteration on this rank; on a device of an average one among those launched together. */
  timesUs: number[];
  /** Elements that differ from the exact sum. */
  wrong: number;
}

/** One rank's last word on a job. */
export type JobResult =
  | { kind: 'generate' | 'score'; steps: number }
  | { kind: 'allreduce'; sizes: AllReduceReport[] }
  | { kind: 'read-bandwidth'; gbPerS: number };
