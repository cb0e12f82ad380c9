// What goes through the model together: the tokens of the next step, and what becomes of a sequence by its row.

import type { Batch, StepResult } from '../native.js';
import type { GenerateJob, RowReport, RunSpec, Sampling, ScoreJob, SequenceSpec, StepReport } from './job.js';

const GREEDY: Sampling = { temperature: 0, topK: 0, topP: 1, seed: 0 };

/** A sequence in a KV-cache slot. */
export interface Active {
  spec: SequenceSpec;
  slot: number;
  /** Prompt, then generated tokens. */
  tokens: number[];
  /** Tokens already in the cache. */
  cached: number;
  finished: boolean;
}

/** One row that a step was asked for. */
export interface WantedRow {
  sequence: Active;
  position: number;
}

/** The tokens of a step, and the rows that it gives in their order. */
export interface NextBatch {
  batch: Batch;
  rows: WantedRow[];
  tokens: StepReport['tokens'];
  kind: StepReport['kind'];
}

/** Tokens that go through the prompt path. */
function promptEnd({ promptIds, replay }: SequenceSpec): number {
  return promptIds.length - (replay ?? 0);
}

/**
 * The tokens of the next step. Prompts go first, in chunks of `limits.tokens` that several sequences may share; then
 * sequences that replay what an earlier run has decoded, a token each; when none is left, every active sequence decodes
 * one token.
 */
export function nextBatch(
  limits: RunSpec['limits'],
  active: Active[],
  job: GenerateJob | ScoreJob,
): NextBatch {
  const prompts = active.filter((s) => s.cached < promptEnd(s.spec));
  const replays = active.filter((s) => s.cached < s.spec.promptIds.length - 1);
  const known = prompts.length > 0 ? prompts : replays;
  const kind: StepReport['kind'] = known.length > 0 ? 'prefill' : 'decode';
  const sampling = job.kind === 'generate' ? job.sampling : GREEDY;
  const tokens: { sequence: number; position: number }[] = [];
  const ids: number[] = [];
  const slots: number[] = [];
  const rows: WantedRow[] = [];
  const rowIndex: number[] = [];
  const targets: number[] = [];
  for (const sequence of kind === 'prefill' ? known : active) {
    const end = sequence.tokens.length;
    const stop = known === prompts ? promptEnd(sequence.spec) : sequence.cached + 1;
    for (let p = sequence.cached; p < stop && tokens.length < limits.tokens; p++) {
      const wanted = job.kind === 'score' || p === end - 1;
      if (wanted && rows.length === limits.rows) break;
      if (wanted) {
        rows.push({ sequence, position: p });
        rowIndex.push(tokens.length);
        targets.push(job.kind === 'score' ? (sequence.tokens[p + 1] ?? -1) : -1);
      }
      ids.push(sequence.tokens[p]!);
      slots.push(sequence.slot);
      tokens.push({ sequence: sequence.spec.sequence, position: p });
    }
  }
  const batch: Batch = {
    tokens: Int32Array.from(ids),
    positions: Int32Array.from(tokens, (t) => t.position),
    slots: Int32Array.from(slots),
    rows: Int32Array.from(rowIndex),
    targets: Int32Array.from(targets),
    temperature: new Float32Array(rows.length).fill(sampling.temperature),
    topK: new Int32Array(rows.length).fill(sampling.topK),
    topP: new Float32Array(rows.length).fill(sampling.topP),
    seed: new Uint32Array(rows.length).fill(sampling.seed),
    sequence: Int32Array.from(rows, (r) => r.sequence.spec.sequence),
  };
  return { batch, rows, tokens, kind };
}

/** Takes row `r` of a step's result: extends the sequence (generate) or scores its next token (score). */
export function finishRow(
  job: GenerateJob | ScoreJob,
  { sequence, position }: WantedRow,
  result: StepResult,
  r: number,
): RowReport {
  const key = { sequence: sequence.spec.sequence, position };
  if (job.kind === 'score') {
    const target = result.targetLogprobs[r]!;
    const targetLogprob = Number.isNaN(target) ? null : target;
    return { ...key, token: -1, logprob: 0, targetLogprob, finish: null };
  }
  const token = result.tokens[r]!;
  sequence.tokens.push(token);
  const generated = sequence.tokens.length - sequence.spec.promptIds.length;
  const stopped = job.stopTokenIds.includes(token);
  const finish = stopped ? 'stop' : generated === sequence.spec.maxTokens ? 'length' : null;
  sequence.finished = finish !== null;
  return { ...key, token, logprob: result.logprobs[r]!, targetLogprob: null, finish };
}
