// Several ranks in one process: real engines, sums in tree order, no sockets. For tests of ops and of the numbers.

import type { Collective } from '../../src/comm/collective.js';
import { FlightRecorder } from '../../src/comm/flight-recorder.js';
import { decode } from '../../src/engine/decode.js';
import type { GenerateJob, RunSpec, ScoreJob, StepReport } from '../../src/engine/job.js';
import { openCheckpoint } from '../../src/model/checkpoint.js';
import type { ModelConfig } from '../../src/model/config.js';
import { makePlan, type Plan } from '../../src/model/plan.js';
import { loadWeights, type WeightSource } from '../../src/model/weights.js';
import {
  type Device,
  type Dtype,
  type Isa,
  type NativeCollective,
  type NativeEngine,
  native,
} from '../../src/native.js';

export interface RanksOptions {
  size: number;
  dtype?: Dtype;
  isa?: Isa;
  device?: Device;
  threads?: number;
  trace?: boolean;
  /** `host` even for one rank: its sync points come back to TypeScript too. */
  collective?: NativeCollective;
  limits?: Partial<RunSpec['limits']>;
}

export interface Rank {
  plan: Plan;
  engine: NativeEngine;
  collective: Collective;
}

/** Engines of all ranks, loaded and prepared. */
export async function openRanks(config: ModelConfig, source: WeightSource, options: RanksOptions) {
  const limits = { tokens: 64, rows: 64, sequences: 8, positions: 256, candidates: 1, ...options.limits };
  const meeting = new Meeting(options.size);
  const ranks = await Promise.all(
    Array.from({ length: options.size }, async (_, rank): Promise<Rank> => {
      const plan = makePlan(config, rank, options.size);
      const engine = new (native().Engine)({
        ...plan,
        device: options.device ?? 'cpu',
        deviceIndex: 0,
        dtype: options.dtype ?? 'float32',
        collective: options.collective ?? (options.size === 1 ? 'local' : 'host'),
        isa: options.isa ?? 'auto',
        threads: options.threads ?? 1,
        limits,
        trace: options.trace ?? false,
      });
      await loadWeights(engine, plan, source);
      await engine.prepare();
      return { plan, engine, collective: meeting.collective(rank) };
    }),
  );
  return {
    ranks,
    limits,
    /** Runs a job on all ranks; the reports of each rank, step by step. */
    async run(
      job: GenerateJob | ScoreJob,
      each?: (report: StepReport, rank: Rank) => void,
    ): Promise<StepReport[][]> {
      return Promise.all(
        ranks.map(async (rank) => {
          const reports: StepReport[] = [];
          const { plan, engine, collective } = rank;
          const decoder = {
            rank: plan.rank,
            size: plan.size,
            engine,
            collective,
            recorder: new FlightRecorder(),
            steps: plan.steps,
            limits,
            trace: options.trace ?? false,
            bursts: options.size === 1,
            onDevice: false,
          };
          await decode(decoder, job, (report) => {
            reports.push(report);
            each?.(report, rank);
          });
          return reports;
        }),
      );
    },
    close() {
      for (const { engine } of ranks) engine.close();
    },
  };
}

/** Ranks of a golden checkpoint. */
export function openGolden(dir: string, options: RanksOptions) {
  const checkpoint = openCheckpoint(dir);
  return openRanks(checkpoint.config, { kind: 'checkpoint', checkpoint }, options).finally(() =>
    checkpoint.close(),
  );
}

/** Joins the parts of a row-major [rows, width] buffer that ranks hold side by side. */
export function joinColumns(parts: Float32Array[], rows: number): Float32Array {
  const width = parts[0]!.length / rows;
  const out = new Float32Array(rows * width * parts.length);
  for (const [rank, part] of parts.entries())
    for (let r = 0; r < rows; r++)
      out.set(part.subarray(r * width, (r + 1) * width), (r * parts.length + rank) * width);
  return out;
}

/** Where the ranks of one process meet: the last to arrive does the sum or the gather for all. */
export class Meeting {
  private waiting: { send: Float32Array; gathered: Float32Array | null; done: () => void }[] = [];

  constructor(private readonly size: number) {}

  collective(rank: number): Collective {
    const meet = (send: Float32Array, gathered: Float32Array | null) =>
      new Promise<void>((done) => {
        this.waiting[rank] = { send, gathered, done };
        if (Object.keys(this.waiting).length === this.size) this.settle();
      });
    return {
      name: 'local',
      next: 1,
      allReduce: (buffer) => meet(buffer, null),
      gather: (send, gathered) => meet(send, gathered),
      limit: () => {},
      pending: () => null,
      close: () => {},
    };
  }

  private settle() {
    const all = this.waiting;
    this.waiting = [];
    if (all[0]!.gathered) {
      const n = all[0]!.send.length;
      const joined = new Float32Array(n * all.length);
      for (const [rank, { send }] of all.entries()) joined.set(send, rank * n);
      for (const { gathered } of all) gathered!.set(joined);
    } else {
      // The balanced binary tree over ranks, neighbours first.
      let level = all.map(({ send }) => Float32Array.from(send));
      while (level.length > 1)
        level = level.flatMap((a, i) => (i % 2 ? [] : [a.map((v, k) => v + level[i + 1]![k]!)]));
      for (const { send } of all) send.set(level[0]!);
    }
    for (const { done } of all) done();
  }
}
