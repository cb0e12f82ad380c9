// What one run computed, kept so that another run can be laid beside it: by sequence and position, a hash of every
// stage's output, the logits row and the token.

import { createHash } from 'node:crypto';
import type { StepReport } from '../engine/job.js';
import { fail } from '../errors.js';

/** One stage of one layer in the hashes of a cell. */
export interface Column {
  stage: string;
  layer: number; // -1 outside the layers
  offset: number;
  parts: number; // virtual shards
  /** Every rank holds its own virtual shards; else every rank holds the same whole. */
  sharded: boolean;
}

/** What a run computed for one token of one sequence. */
export interface Cell {
  /** Hashes in plan order, see `Column`; 0 where a stage works only on tokens with a logits row and this has none. */
  marks: BigUint64Array;
  row: Row | null;
}

export interface Row {
  /** Sampled token, -1 when none was sampled. */
  token: number;
  logprob: number;
  /** Hash of the row's fp32 bytes; '' when none were sent. */
  hash: string;
  /** The row itself, [vocab]; null beyond the transcript's budget. */
  logits: Float32Array | null;
}

/** A run's cells. Rows of logits are kept until they take `budgetBytes`; their hashes always. */
export class Transcript {
  columns: Column[] = [];
  #cells = new Map<number, Map<number, Cell>>();
  #budget: number;

  constructor(budgetBytes = 1 << 30) {
    this.#budget = budgetBytes;
  }

  add(step: StepReport): void {
    const columns = columnsOf(step);
    if (this.columns.length === 0) this.columns = columns;
    for (const [{ sequence, position }, cell] of cellsOf(step, columns)) {
      if (cell.row?.logits) {
        this.#budget -= cell.row.logits.byteLength;
        cell.row.logits = this.#budget < 0 ? null : cell.row.logits.slice();
      }
      const positions = this.#cells.get(sequence) ?? new Map<number, Cell>();
      this.#cells.set(sequence, positions.set(position, cell));
    }
  }

  cell(sequence: number, position: number): Cell | undefined {
    return this.#cells.get(sequence)?.get(position);
  }

  /** Every (sequence, position), sequences and positions ascending. */
  *places(sequences: ReadonlySet<number>): Generator<{ sequence: number; position: number }> {
    for (const [sequence, cells] of [...this.#cells].sort(([a], [b]) => a - b)) {
      if (!sequences.has(sequence)) continue;
      for (const position of [...cells.keys()].sort((a, b) => a - b)) yield { sequence, position };
    }
  }
}

export function columnsOf(step: StepReport): Column[] {
  let offset = 0;
  return (step.trace ?? []).map(({ stage, layer, parts, sharded }) => {
    const column = { stage, layer, offset, parts, sharded };
    offset += parts;
    return column;
  });
}

/** The cells of one step; the logits are views into the step's own memory. */
export function* cellsOf(
  step: StepReport,
  columns: readonly Column[],
): Generator<[place: { sequence: number; position: number }, cell: Cell]> {
  const width = columns.reduce((sum, { parts }) => sum + parts, 0);
  const vocab = step.logits ? step.logits.length / step.rows.length : 0;
  const rowOf = new Map(step.rows.map((row, i) => [`${row.sequence} ${row.position}`, i]));
  for (const [t, place] of step.tokens.entries()) {
    const r = rowOf.get(`${place.sequence} ${place.position}`);
    const marks = new BigUint64Array(width);
    for (const [i, { offset, parts, stage }] of columns.entries()) {
      const { hashes } = step.trace![i]!;
      // A stage after the layers sees only the tokens whose logits are wanted.
      const everyToken = hashes.length === step.tokens.length * parts;
      if (!everyToken && hashes.length !== step.rows.length * parts) {
        throw fail('TP_INTERNAL', `trace of ${stage} holds ${hashes.length} hashes for ${parts} parts`);
      }
      const at = everyToken ? t : r;
      if (at !== undefined) marks.set(hashes.subarray(at * parts, (at + 1) * parts), offset);
    }
    yield [place, { marks, row: r === undefined ? null : rowAt(step, r, vocab) }];
  }
}

function rowAt(step: StepReport, r: number, vocab: number): Row {
  const { token, logprob } = step.rows[r]!;
  const logits = step.logits?.subarray(r * vocab, (r + 1) * vocab) ?? null;
  const hash = logits ? createHash('sha256').update(logits).digest('base64') : '';
  return { token, logprob, hash, logits };
}
