// The all-reduce alone, timed and checked: the sums are exact in fp32, so one wrong element counts.

import type { Collective } from '../comm/collective.js';
import type { AllReduceJob, AllReduceReport, JobResult } from './job.js';

/** Times every iteration of every size on this rank; all ranks run it together. */
export async function benchAllReduce(
  collective: Collective,
  { rank, size }: { rank: number; size: number },
  job: AllReduceJob,
): Promise<JobResult> {
  const sizes: AllReduceReport[] = [];
  for (const floats of job.floats) {
    const report: AllReduceReport = { floats, timesUs: [], wrong: 0 };
    const buffer = new Float32Array(floats);
    for (let i = -job.warmup; i < job.iterations; i++) {
      fill(buffer, rank, i);
      const start = performance.now();
      await collective.allReduce(buffer);
      if (i >= 0) report.timesUs.push((performance.now() - start) * 1000);
      report.wrong += countWrong(buffer, size, i);
    }
    sizes.push(report);
  }
  return { kind: 'allreduce', sizes };
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
