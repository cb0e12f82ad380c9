// The all-reduce alone, timed and checked: the sums are exact in fp32, so one wrong element counts.

import type { Collective } from '../comm/collective.js';
import { fromNative, type NativeEngine } from '../native.js';
import type { AllReduceJob, AllReduceReport, JobResult } from './job.js';

/** Who takes part, and with what. */
interface Participant {
  rank: number;
  size: number;
  engine: NativeEngine;
  collective: Collective;
  /** The run's collective stays on the device; `collective` is the host's. */
  onDevice: boolean;
}

/** Times every size on this rank; all ranks run it together. */
export async function benchAllReduce(self: Participant, job: AllReduceJob): Promise<JobResult> {
  const sizes: AllReduceReport[] = [];
  for (const launch of self.onDevice ? (['stream', 'graph'] as const) : (['host'] as const)) {
    for (const floats of job.floats) {
      const measured = launch === 'host' ? onHost(self, floats, job) : onDevice(self, floats, job, launch);
      sizes.push({ floats, launch, ...(await measured) });
    }
  }
  return { kind: 'allreduce', sizes };
}

type Measured = Pick<AllReduceReport, 'timesUs' | 'wrong'>;

async function onDevice(
  { engine }: Participant,
  floats: number,
  { warmup, iterations }: AllReduceJob,
  launch: 'stream' | 'graph',
): Promise<Measured> {
  try {
    const times = await engine.timeAllReduce(floats, iterations, warmup, launch === 'graph');
    return { timesUs: [...times.timesUs], wrong: times.wrong };
  } catch (error) {
    throw fromNative(error);
  }
}

async function onHost(
  { collective, rank, size }: Participant,
  floats: number,
  { warmup, iterations }: AllReduceJob,
): Promise<Measured> {
  const measured: Measured = { timesUs: [], wrong: 0 };
  const buffer = new Float32Array(floats);
  for (let i = -warmup; i < iterations; i++) {
    fill(buffer, rank, i);
    const start = performance.now();
    await collective.allReduce(buffer);
    if (i >= 0) measured.timesUs.push((performance.now() - start) * 1000);
    measured.wrong += countWrong(buffer, size, i);
  }
  return measured;
}

/** Small whole numbers that differ by element, rank and iteration. */
function fill(buffer: Float32Array, rank: number, iteration: number): void {
  for (let i = 0; i < buffer.length; i++) buffer[i] = ((i + iteration) % 251) + rank;
}

function countWrong(buffer: Float32Array, ranks: number, iteration: number): number {
  const ofRanks = (ranks * (ranks - 1)) / 2;
  let wrong = 0;
  for (let i = 0; i < buffer.length; i++) {
    if (buffer[i] !== ranks * ((i + iteration) % 251) + ofRanks) wrong++;
  }
  return wrong;
}
