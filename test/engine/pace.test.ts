// Bursts over several ranks with a collective on the device: every rank must run the same number of steps, whatever its
// clock says, or a rank waits in a step that the others never make.

import { describe, expect, it } from 'vitest';
import { FlightRecorder } from '../../src/comm/flight-recorder.js';
import { decode } from '../../src/engine/decode.js';
import type { GenerateJob, StepReport } from '../../src/engine/job.js';
import type { Batch, Burst, NativeEngine } from '../../src/native.js';
import { Meeting } from '../helpers/ranks.js';

/** An engine whose step takes `stepMs` and whose n-th step samples token n for every sequence. */
class Clockwork {
  readonly bursts: number[] = [];
  readonly #stepMs: number;
  #rows = 0;
  #steps = 0;

  constructor(stepMs: number) {
    this.#stepMs = stepMs;
  }

  begin(batch: Batch): void {
    this.#rows = batch.rows.length;
  }

  async run(): Promise<number> {
    this.bursts.push(1);
    this.#steps++;
    await new Promise((done) => setTimeout(done, this.#stepMs));
    return 1;
  }

  result() {
    return this.#sampled([this.#steps]);
  }

  async decode(steps: number): Promise<Burst> {
    this.bursts.push(steps);
    await new Promise((done) => setTimeout(done, steps * this.#stepMs));
    const made = Array.from({ length: steps }, () => ++this.#steps);
    const endMs = Float64Array.from(made, (n) => n * this.#stepMs);
    return { ...this.#sampled(made), endMs };
  }

  stats() {
    return { weightBytes: 0, cacheBytes: 0, readBytes: 0, expertsRead: 0 };
  }

  #sampled(steps: readonly number[]) {
    const tokens = Int32Array.from(steps.flatMap((n) => Array<number>(this.#rows).fill(n)));
    const none = new Float32Array(tokens.length);
    return { tokens, logprobs: none, targetLogprobs: none };
  }
}

const job = (maxTokens: number[], stopTokenIds: number[]): GenerateJob => ({
  kind: 'generate',
  sequences: maxTokens.map((most, sequence) => ({ promptIds: [1], maxTokens: most, sequence })),
  sampling: { temperature: 0, topK: 0, topP: 1, seed: 0 },
  stopTokenIds,
  keepLogits: false,
  fault: null,
});

async function run(stepMs: readonly number[], what: GenerateJob, sequences: number) {
  const meeting = new Meeting(stepMs.length);
  return Promise.all(
    stepMs.map(async (ms, rank) => {
      const engine = new Clockwork(ms);
      const recorder = new FlightRecorder();
      const tokens: number[] = [];
      await decode(
        {
          rank,
          size: stepMs.length,
          engine: engine as unknown as NativeEngine,
          collective: meeting.collective(rank),
          recorder,
          steps: [{ op: 'sample', stage: 'sample', layer: -1, weights: {} }],
          limits: { tokens: 8, rows: 8, sequences, positions: 4096, candidates: 1 },
          trace: false,
          bursts: true,
          onDevice: true,
        },
        what,
        (report: StepReport) => void tokens.push(...report.rows.map(({ token }) => token)),
      );
      return { bursts: engine.bursts, tokens, agreed: recorder.entries().at(-1)?.place ?? 0 };
    }),
  );
}

describe('bursts over ranks of different speed', () => {
  it('have one length on all of them, also when a sequence ends in the middle of one', async () => {
    const [fast, slow] = await run([2, 2.6], job([2000], [333]), 1);
    expect(fast!.bursts).toEqual(slow!.bursts);
    expect(fast!.tokens).toEqual(Array.from({ length: 333 }, (_, i) => i + 1));
    const longest = Math.max(...fast!.bursts);
    expect(longest).toBeGreaterThan(4);
    expect(longest).toBeLessThanOrEqual(50 / 2.6); // the slower one decides
  });

  it('stay the same as sequences come and go', async () => {
    const [fast, slow] = await run([1, 3], job([100, 40, 300, 7, 90], []), 2);
    expect(fast!.bursts).toEqual(slow!.bursts);
    expect(fast!.tokens).toEqual(slow!.tokens);
    expect(fast!.tokens).toHaveLength(537);
  });

  it('are agreed on rarely', async () => {
    const [fast] = await run([2, 2.5], job([600], []), 1);
    const collectives = fast!.agreed - fast!.bursts.length; // the recorder also counts the bursts themselves
    expect(collectives).toBeLessThan(fast!.bursts.length / 4);
  });
});
