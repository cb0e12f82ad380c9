// The last collectives of a rank: what it sent where, and what it still waits for. A launcher lays the ranks' records side
// by side when a run hangs: the rank that never came, or came with another size, stands out.

/** One collective as a rank tells it; times by its own clock, which no other rank shares. */
export interface RecordedCollective {
  /** Number of the collective on this rank, from 1; equal on all ranks. */
  n: number;
  op: string;
  layer: number; // -1 outside the layers
  stage: string;
  bytes: number;
  /** How long ago it began, in ms. */
  agoMs: number;
  /** How long it took, in ms; null = under way. */
  tookMs: number | null;
}

interface Slot extends Omit<RecordedCollective, 'agoMs'> {
  at: number;
}

export const MOST_RECORDED = 32;

export class FlightRecorder {
  readonly #slots: Slot[] = [];
  #n = 0;

  /** A collective begins; call what it returns when it is done. */
  begin(op: string, layer: number, stage: string, bytes: number): () => void {
    const at = performance.now();
    const slot: Slot = { n: ++this.#n, op, layer, stage, bytes, at, tookMs: null };
    this.#slots[slot.n % MOST_RECORDED] = slot;
    return () => {
      slot.tookMs = performance.now() - at;
    };
  }

  /** The latest last. */
  entries(): RecordedCollective[] {
    const now = performance.now();
    return this.#slots
      .filter(() => true) // the array has holes until it is full
      .sort((a, b) => a.n - b.n)
      .map(({ at, ...slot }) => ({ ...slot, agoMs: now - at }));
  }
}

/** `allReduce #57 (layer 3 attnOut, 11264 bytes)` */
export function describeEntry({ op, n, layer, stage, bytes }: RecordedCollective): string {
  const place = layer < 0 ? stage : `layer ${layer} ${stage}`;
  return `${op} #${n} (${place}, ${bytes} bytes)`;
}

/**
 * What the records of several ranks say together: the first collective whose sizes or kinds differ, else the one that some
 * rank waits in and another never came to. Null when they agree, or when fewer than two are known.
 */
export function compareRecords(records: ReadonlyMap<number, readonly RecordedCollective[]>): string | null {
  const byNumber = new Map<number, [rank: number, entry: RecordedCollective][]>();
  for (const [rank, entries] of records)
    for (const entry of entries) byNumber.set(entry.n, [...(byNumber.get(entry.n) ?? []), [rank, entry]]);
  const numbers = [...byNumber.keys()].sort((a, b) => a - b);
  for (const n of numbers) {
    const [first, ...others] = byNumber.get(n)!;
    const odd = others.find(([, e]) => e.op !== first![1].op || e.bytes !== first![1].bytes);
    if (odd)
      return `rank ${first![0]} is at ${describeEntry(first![1])}, rank ${odd[0]} at ${describeEntry(odd[1])}`;
  }
  const last = [...records].map(([rank, entries]) => [rank, entries.at(-1)] as const);
  const front = Math.max(...last.map(([, entry]) => entry?.n ?? 0));
  const behind = last.filter(([, entry]) => (entry?.n ?? 0) < front).map(([rank]) => rank);
  const waiting = last.find(([, entry]) => entry?.n === front && entry.tookMs === null);
  if (behind.length === 0 || !waiting) return null;
  const [rank, entry] = waiting;
  const who = behind.length === 1 ? `rank ${behind[0]}` : `ranks ${behind.join(', ')}`;
  return `${who} never came to ${describeEntry(entry!)}, in which rank ${rank} has waited for ${Math.round(entry!.agoMs)} ms`;
}
