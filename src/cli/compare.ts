// Lays a run beside a transcript, bit for bit, and finds the first place where they part.

import type { StepReport } from '../engine/job.js';
import { fail } from '../errors.js';
import { type Cell, type Column, cellsOf, columnsOf, type Row, type Transcript } from './transcript.js';

/** How deep a comparison looks; each level includes the ones before. */
export const LEVELS = ['tokens', 'logits', 'layers'] as const;
export type Level = (typeof LEVELS)[number];

interface Parting {
  layer: number; // -1 outside the layers
  stage: string;
  /** What differs there. */
  what: 'output' | 'logits' | 'token' | 'missing';
}

/** Where two runs part. */
export interface Difference extends Parting {
  sequence: number;
  position: number;
}

/** How far logits rows are apart. */
export interface Distance {
  maxDelta: number;
  /** Steps between neighbouring fp32 numbers. */
  maxUlp: number;
  /** Rows whose likeliest token differs. */
  topFlips: number;
}

export interface Comparison {
  /** Tokens, logits rows, values in them, and stage outputs that were compared. */
  compared: { tokens: number; rows: number; values: number; outputs: number };
  /** Sequences and (sequence, position) cells that differ. */
  differing: { sequences: number; cells: number };
  /** The earliest position of the lowest sequence that differs. */
  first: Difference | null;
  /** Over different rows that came from equal tokens; null where there are none or they were not kept. */
  distance: Distance | null;
}

const MISSING: Parting = { layer: -1, stage: 'embed', what: 'missing' };

/** Compares a run over `sequences` with `base`: give every step to `add`, then ask `finish`. */
export class Comparer {
  readonly #base: Transcript;
  readonly #level: number;
  readonly #sequences: ReadonlySet<number>;
  readonly #seen = new Set<string>();
  readonly #differences: Difference[] = [];
  readonly #rows: { sequence: number; position: number; distance: Distance }[] = [];
  /** First position of a sequence at which the runs chose different tokens. */
  readonly #parted = new Map<number, number>();
  readonly #compared = { tokens: 0, rows: 0, values: 0, outputs: 0 };

  constructor(base: Transcript, level: Level, sequences: ReadonlySet<number>) {
    this.#base = base;
    this.#level = LEVELS.indexOf(level);
    this.#sequences = sequences;
  }

  add(step: StepReport): void {
    const columns = columnsOf(step);
    requireSame(this.#base.columns, columns);
    for (const [place, cell] of cellsOf(step, columns)) {
      const base = this.#base.cell(place.sequence, place.position);
      this.#seen.add(`${place.sequence} ${place.position}`);
      const parting = base ? this.#compare(base, cell) : MISSING;
      if (parting) this.#differences.push({ ...place, ...parting });
      if (base?.row?.logits && cell.row?.logits && base.row.hash !== cell.row.hash) {
        this.#rows.push({ ...place, distance: distanceOf(base.row.logits, cell.row.logits) });
      }
      if (base?.row && base.row.token !== cell.row?.token) {
        const before = this.#parted.get(place.sequence) ?? Infinity;
        this.#parted.set(place.sequence, Math.min(before, place.position));
      }
    }
  }

  finish(): Comparison {
    for (const place of this.#base.places(this.#sequences)) {
      if (!this.#seen.has(`${place.sequence} ${place.position}`)) {
        this.#differences.push({ ...place, ...MISSING });
      }
    }
    this.#differences.sort((a, b) => a.sequence - b.sequence || a.position - b.position);
    return {
      compared: this.#compared,
      differing: {
        sequences: new Set(this.#differences.map(({ sequence }) => sequence)).size,
        cells: this.#differences.length,
      },
      first: this.#differences[0] ?? null,
      distance: this.#distance(),
    };
  }

  #compare(base: Cell, cell: Cell): Parting | null {
    if (this.#level >= LEVELS.indexOf('layers')) {
      this.#compared.outputs += this.#base.columns.length;
      const column = this.#base.columns.find((c) => !sameMarks(base.marks, cell.marks, c));
      if (column) return { layer: column.layer, stage: column.stage, what: 'output' };
    }
    if (!base.row && !cell.row) return null;
    return base.row && cell.row ? this.#compareRows(base.row, cell.row) : MISSING;
  }

  #compareRows(base: Row, row: Row): Parting | null {
    this.#compared.tokens++;
    if (this.#level >= LEVELS.indexOf('logits')) {
      this.#compared.rows++;
      this.#compared.values += row.logits?.length ?? 0;
      if (base.hash !== row.hash) return { layer: -1, stage: 'logits', what: 'logits' };
      // Object.is tells -0 from 0, and a NaN equals itself.
      if (!Object.is(base.logprob, row.logprob)) return { layer: -1, stage: 'sample', what: 'output' };
    }
    return base.token === row.token ? null : { layer: -1, stage: 'sample', what: 'token' };
  }

  /** Rows after a sequence's first different token come from other inputs: they say nothing. */
  #distance(): Distance | null {
    const rows = this.#rows.filter(
      ({ sequence, position }) => position <= (this.#parted.get(sequence) ?? Infinity),
    );
    if (rows.length === 0) return null;
    return {
      maxDelta: Math.max(...rows.map(({ distance }) => distance.maxDelta)),
      maxUlp: Math.max(...rows.map(({ distance }) => distance.maxUlp)),
      topFlips: rows.reduce((n, { distance }) => n + distance.topFlips, 0),
    };
  }
}

function sameMarks(a: BigUint64Array, b: BigUint64Array, { offset, parts }: Column): boolean {
  for (let i = offset; i < offset + parts; i++) if (a[i] !== b[i]) return false;
  return true;
}

/** Two runs of one model trace the same stages with the same virtual shards, whatever the number of ranks. */
function requireSame(base: readonly Column[], columns: readonly Column[]): void {
  const same =
    base.length === columns.length &&
    base.every(({ stage, layer, parts }, i) => {
      const other = columns[i]!;
      return stage === other.stage && layer === other.layer && parts === other.parts;
    });
  if (!same) throw fail('TP_INTERNAL', `traces of ${base.length} and ${columns.length} stages do not match`);
}

/** Distance of two rows of equal length. */
export function distanceOf(a: Float32Array, b: Float32Array): Distance {
  const distance: Distance = { maxDelta: 0, maxUlp: 0, topFlips: topOf(a) === topOf(b) ? 0 : 1 };
  const bitsOfA = new Int32Array(a.slice().buffer);
  const bitsOfB = new Int32Array(b.slice().buffer);
  for (let i = 0; i < a.length; i++) {
    if (bitsOfA[i] === bitsOfB[i]) continue;
    // A NaN against a number is as far as it gets.
    const delta = Math.abs(a[i]! - b[i]!);
    distance.maxDelta = Math.max(distance.maxDelta, Number.isNaN(delta) ? Infinity : delta);
    distance.maxUlp = Math.max(distance.maxUlp, Math.abs(rankOf(bitsOfA[i]!) - rankOf(bitsOfB[i]!)));
  }
  return distance;
}

/** fp32 bits as a number that counts representable values from zero; -0 lies one below 0. */
function rankOf(bits: number): number {
  return bits >= 0 ? bits : -1 - (bits & 0x7fffffff);
}

function topOf(row: Float32Array): number {
  let top = 0;
  for (let i = 1; i < row.length; i++) if (row[i]! > row[top]!) top = i;
  return top;
}
