// The one typed face of the native addon; nothing else requires it. Classes and functions here are native/binding.
// Numbers cross as numbers and typed arrays only; every method that computes or reads runs off the main thread.

import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { fail, TpError } from './errors.js';

export type Dtype = 'bfloat16' | 'float32';
export type Device = 'cpu' | 'cuda';
/** How the program treats a sync step: `local` does nothing (size 1), `host` returns to TypeScript, others stay on the GPU. */
export type NativeCollective = 'local' | 'host' | 'peer' | 'nccl';
export type Isa = 'auto' | 'generic' | 'avx2' | 'avx512';

/** A box of a stored tensor, see model/shard.ts. */
export interface NativeSlice {
  shape: readonly number[];
  start: readonly number[];
  stop: readonly number[];
}

/** One entry of the plan. `weights` maps a role of the op to a tensor name. */
export interface NativeStep {
  /** op name of native/ops/ops.h, or `allReduce` / `allGather` for a sync point */
  op: string;
  /** stage name for people: traces, errors, the summary */
  stage: string;
  layer: number; // -1 outside the layers
  weights: Readonly<Record<string, string>>;
  /** sync points: which buffer of the program travels */
  buffer?: string;
}

/** Everything the engine must know of one layer, local to this rank. */
export interface NativeLayer {
  heads: number; // local query heads
  kvHeads: number; // local KV heads (replicated when there are fewer than ranks)
  headDim: number;
  window: number; // 0 = all positions
  kEqV: boolean;
  ropeTheta: number;
  rotaryPairs: number;
}

export interface EngineSpec {
  device: Device;
  dtype: Dtype;
  collective: NativeCollective;
  isa: Isa;
  threads: number;
  rank: number;
  size: number;
  /** GPU among those that the process sees; 0 on the CPU. */
  deviceIndex: number;
  model: {
    hidden: number;
    vocab: number;
    intermediate: number; // local
    moeIntermediate: number; // local
    experts: number;
    topK: number;
    eps: number;
    softcap: number; // 0 = none
    leaves: number; // V: virtual shards of the whole model
    embedScale: number; // sqrt(hidden) in float32; rounded to bfloat16 in that dtype
  };
  layers: readonly NativeLayer[];
  /** Tensors this rank holds, with their local shapes. */
  tensors: readonly { name: string; shape: readonly number[] }[];
  steps: readonly NativeStep[];
  limits: {
    tokens: number; // most tokens in one step
    rows: number; // most rows with logits in one step
    sequences: number; // KV-cache slots
    positions: number; // positions a sequence may reach
    candidates: number; // candidates per virtual vocabulary shard that the sampler gathers
  };
  /** Keep a hash of every stage's output, see `traceRows`. */
  trace: boolean;
  /** Record no CUDA graph, false unless said: every kernel is launched by itself. */
  eager?: boolean;
}

/** One step's input. T tokens, R rows (tokens whose logits are wanted), all of one rank's view, equal on every rank. */
export interface Batch {
  tokens: Int32Array; // [T]
  positions: Int32Array; // [T]
  slots: Int32Array; // [T] KV-cache slot of the token's sequence
  rows: Int32Array; // [R] index into tokens
  targets: Int32Array; // [R] token whose log-probability is wanted, -1 = none
  temperature: Float32Array; // [R] 0 = greedy
  topK: Int32Array; // [R] 0 = all
  topP: Float32Array; // [R] 1 = all
  seed: Uint32Array; // [R]
  sequence: Int32Array; // [R] number of the sequence in the run: the random stream is keyed (seed, sequence, position, token)
}

/** Flips one unit in the last place of one element of a stage's output; for check's negative control. */
export interface Fault {
  stage: string;
  layer: number;
  position: number; // position of the token hit
  slot: number;
}

export interface StepResult {
  tokens: Int32Array; // [R] sampled token
  logprobs: Float32Array; // [R] its log-probability, before temperature and filters
  targetLogprobs: Float32Array; // [R] NaN where no target was asked
}

/** Results of a burst of decode steps. */
export interface Burst {
  tokens: Int32Array; // [steps, R]
  logprobs: Float32Array; // [steps, R]
  endMs: Float64Array; // [steps] when each ended, on the device's clock
}

/** One GPU as the driver shows it. */
export interface CudaDevice {
  name: string;
  computeCapability: string;
  freeBytes: number;
  totalBytes: number;
  /** GPUs whose memory it can reach. */
  peers: number[];
}

/** How GPUs are joined, lists by device index; for people, see doctor. */
export interface GpuTopology {
  driver: string; // '' = not known: see why
  cuda: string; // newest CUDA that the driver runs; '' without a driver
  why: string; // why NVML cannot be asked
  nvlinks: number[]; // active NVLinks, -1 = not known
  pci: string[]; // bus ids
  ipc: string[]; // '' = its memory can be opened by other processes, else why not
  /** `from` reaches the memory of `to`, also with atomics (NVLink). */
  pairs: { from: number; to: number; access: boolean; atomics: boolean }[];
}

/** Hashes of one stage's output in the last step. */
export interface TraceEntry {
  stage: string;
  layer: number;
  parts: number; // virtual shards of this buffer on this rank; 1 for a replicated buffer
  sharded: boolean;
  hashes: BigUint64Array; // [T or R, parts] over the raw fp32 bytes of each row (and shard)
}

/**
 * When the plan's steps ran in the last decoding step: ns of the host's monotonic clock, which `process.hrtime` reads too.
 * NaN for a step that does not stand by itself: a sync that the stage behind it does, that the host does, or that has
 * nobody to join.
 */
export interface StageTimes {
  spans: Float64Array; // [steps, 3] begin, inputs there, end
  bytes: Float64Array; // [steps] of weights and cache that it had to read
  blocks: Int32Array; // [B] blocks of a GPU that `marks` tells of; none where every op is a launch
  marks: Float64Array; // [B, steps, 3] the same of one block
}

export interface LoadProgress {
  bytes: number;
}

/**
 * One rank's engine: weights, KV cache, program. Calls that return a promise run one after another on the engine's own
 * thread; the others throw TP_NATIVE while one of those is pending. An open engine does not keep the process alive.
 */
export interface NativeEngine {
  /** Fills tensor `name` with this rank's slice of the synthetic tensor (see model/synthetic.ts). */
  synthesize(
    name: string,
    slice: NativeSlice,
    key: readonly [number, number],
    scale: number,
    offset: number,
  ): Promise<void>;
  /** Reads this rank's slice of a BF16 tensor that starts at byte `offset` of the open file `fd`. */
  readTensor(name: string, slice: NativeSlice, fd: number, offset: number): Promise<void>;
  /** Checks that every tensor is loaded and resolves the steps. */
  prepare(): Promise<void>;
  begin(batch: Batch): void;
  /** Runs from step `from`; returns the index of the sync step that the host must do, or steps.length at the end. */
  run(from: number): Promise<number>;
  /**
   * Runs `steps` whole decode steps, each on what the one before it sampled, without the host between them: a batch
   * whose every token has a row, and a collective that is not `host`. At most 256 steps.
   */
  decode(steps: number): Promise<Burst>;
  /** What joinCollective needs of this rank, of one length on all ranks. */
  collectiveHello(): Uint8Array;
  /** Joins a device collective from all ranks' hellos, in rank order. */
  joinCollective(hellos: readonly Uint8Array[], timeoutMs: number): Promise<void>;
  /** The buffer of sync step `index`: what this rank contributes; for an all-gather `gathered` has room for every rank's. */
  syncBuffers(index: number): { send: Float32Array; gathered: Float32Array | null };
  result(): StepResult;
  /** Copy of this rank's logits of the last step, after the softcap: [R, vocab / size]. */
  logits(): Float32Array;
  /**
   * Copy of program buffer `name`, valid rows only. For tests and dumps. `q` and `attention` have room for the widest
   * layer; the rows of a narrower one are packed at the front.
   */
  readBuffer(name: string): Float32Array;
  writeBuffer(name: string, values: Float32Array): void;
  trace(): TraceEntry[];
  plantFault(fault: Fault | null): void;
  stats(): EngineStats;
  /** From now on `run` notes when every step of the plan runs, and records no graph; `decode` is refused meanwhile. */
  timeStages(on: boolean): Promise<void>;
  /** Of the last whole step. */
  stageTimes(): StageTimes;
  /**
   * Fills all positions of a slot's cache with made-up keys and values, the same ones every time: to measure a long context
   * without its prompt.
   */
  fillCache(slot: number): Promise<void>;
  /** Streams through this rank's own weights for about `seconds`; GB/s. */
  readBandwidth(seconds: number): Promise<number>;
  /**
   * The device collective's all-reduce of `floats` values: a time per sample, each the mean of many launched one by one
   * (32), or of many recorded in one CUDA graph (256); all ranks call it together. Every sum is checked.
   */
  timeAllReduce(floats: number, samples: number, warmup: number, graph: boolean): Promise<AllReduceTimes>;
  /**
   * What the device collective says went wrong while nobody called it, such as NCCL's asynchronous errors; '' if nothing
   * did. Also while a call is pending: work that waits for a lost peer never ends by itself.
   */
  collectiveError(): string;
  /** Frees kernels that wait for a peer: the call under way rejects with TP_COLLECTIVE, and so do all later ones. */
  abort(): void;
  close(): void;
}

export interface AllReduceTimes {
  timesUs: Float64Array; // [samples] microseconds of one all-reduce
  wrong: number; // elements that differ from the exact sum
}

export interface EngineStats {
  weightBytes: number; // resident weights
  cacheBytes: number; // resident KV cache
  readBytes: number; // weight and cache bytes that the steps since the last call had to read
  expertsRead: number; // distinct (layer, expert) pairs among them
}

/** Ways to compute the experts: ours as decoding uses them, ours for many tokens, and a published design to compare with. */
export const MOE_VARIANTS = ['published', 'grouped', 'auto'] as const;
export type MoeVariant = (typeof MOE_VARIANTS)[number];

/** One rank's part of a layer's experts, and what to time. */
export interface MoeBenchSpec {
  deviceIndex: number;
  hidden: number;
  width: number;
  experts: number;
  topK: number;
  leaves: number;
  cases: readonly { variant: MoeVariant; tokens: number }[];
  replays: number;
  seed: number;
}

export interface MoeBenchResult {
  gpu: string;
  readGbPerS: number; // of a kernel that only reads
  cases: {
    us: Float64Array; // one a replay
    experts: number; // distinct experts a block reads
    bytes: number; // of their weights
    distance: number; // of the output from auto's, relative
  }[];
}

interface Addon {
  Engine: new (spec: EngineSpec) => NativeEngine;
  version(): { addon: string; cuda: string | null; isa: Isa[] };
  /** GPUs and NCCL as this process finds them; `why` and `ncclWhy` say what is missing. */
  cuda(): { devices: CudaDevice[]; why: string; nccl: string | null; ncclWhy: string };
  /** Asks the driver and NVML; makes a context on every GPU. */
  topology(): GpuTopology;
  /** Times the experts alone on one GPU. */
  benchMoe(spec: MoeBenchSpec): Promise<MoeBenchResult>;
  /** Ends this process (exit code 4) when the other end of pipe `fd` closes, from a native thread. */
  watchParent(fd: number): void;
  /**
   * Keeps all threads of this process to rank `rank`'s share of the cores: at least `threads`. Returns how many; 0 when
   * the cores do not suffice for a share each.
   */
  keepToCores(rank: number, ranks: number, threads: number): number;
  /** For `ms` from now a native thread of idle priority keeps a core of this process from halting. */
  stayAwake(ms: number): void;
  /** Elements [start, start + out.length) of a synthetic tensor as BF16 bits. */
  synthesize(
    out: Uint16Array,
    start: number,
    key: readonly [number, number],
    scale: number,
    offset: number,
  ): void;
}

let loaded: Addon | undefined;

/** Loads the addon once; a missing or unloadable one is TP_ADDON_MISSING. */
export function native(): Addon {
  if (loaded) return loaded;
  const path = join(dirname(fileURLToPath(import.meta.url)), '..', 'build', 'tp_run.node');
  try {
    loaded = createRequire(import.meta.url)(path) as Addon;
  } catch (error) {
    throw fail('TP_ADDON_MISSING', path, (error as Error).message);
  }
  return loaded;
}

/** Turns an error thrown by the addon (`{code, message}`) into a TpError; others pass through. */
export function fromNative(error: unknown): unknown {
  if (error instanceof TpError || !(error instanceof Error)) return error;
  const code = (error as { code?: unknown }).code;
  if (typeof code !== 'string' || !code.startsWith('TP_')) return error;
  return new TpError(code, code === 'TP_MEMORY' ? 2 : 4, error.message);
}
