// The last collectives of a rank: what it sent where, and what it still waits for. A launcher lays the ranks' records side
// by side when a run hangs: the rank that never came, or came with another size, stands out.

/** One collective as a rank tells it; times by its own clock, which no other rank shares. */
export interface RecordedCollective {
  /** Its place among what the rank recorded, from 1; equal on all ranks. */
  place: number;
  /** The number that the collective gives it, by which errors name it; null = steps on the device, which have none. */
  n: number | null;
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
  #places = 0;

  /** A collective begins; call what it returns when it is done. */
  begin(op: string, layer: number, stage: string, bytes: number, n: number | null): () => void {
    const at = performance.now();
    const slot: Slot = { place: ++this.#places, n, op, layer, stage, bytes, at, tookMs: null };
    this.#slots[slot.place % MOST_RECORDED] = slot;
    return () => {
      slot.tookMs = performance.now() - at;
    };
  }

  /** The latest last. */
  entries(): RecordedCollective[] {
    const now = performance.now();
    return this.#slots
      .filter(() => true) // the array has holes until it is full
      .sort((a, b) => a.place - b.place)
      .map(({ at, ...slot }) => ({ ...slot, agoMs: now - at }));
  }
}

/** `allReduce #57 (layer 3 attnOut, 11264 bytes)`, `16 steps (on the device)` */
export function describeEntry({ op, n, layer, stage, bytes }: RecordedCollective): string {
  const where = layer < 0 ? stage : `layer ${layer} ${stage}`;
  return n === null ? `${op} (${where})` : `${op} #${n} (${where}, ${bytes} bytes)`;
}

/**
 * What the records of several ranks say together: the first collective whose sizes or kinds differ, else the one that some
 * rank waits in and another never came to. Null when they agree, or when fewer than two are known.
 */
export function compareRecords(records: ReadonlyMap<number, readonly RecordedCollective[]>): string | null {
  const byPlace = new Map<number, [rank: number, entry: RecordedCollective][]>();
  for (const [rank, entries] of records)
    for (const entry of entries)
      byPlace.set(entry.place, [...(byPlace.get(entry.place) ?? []), [rank, entry]]);
  const places = [...byPlace.keys()].sort((a, b) => a - b);
  for (const place of places) {
    const [first, ...others] = byPlace.get(place)!;
    const odd = others.find(([, e]) => e.op !== first![1].op || e.bytes !== first![1].bytes);
    if (odd)
      return `rank ${first![0]} is at ${describeEntry(first![1])}, rank ${odd[0]} at ${describeEntry(odd[1])}`;
  }
  const last = [...records].map(([rank, entries]) => [rank, entries.at(-1)] as const);
  const front = Math.max(...last.map(([, entry]) => entry?.place ?? 0));
  const behind = last.filter(([, entry]) => (entry?.place ?? 0) < front).map(([rank]) => rank);
  const waiting = last.find(([, entry]) => entry?.place === front && entry.tookMs === null);
  if (behind.length === 0 || !waiting) return null;
  const [rank, entry] = waiting;
  const who = behind.length === 1 ? `rank ${behind[0]}` : `ranks ${behind.join(', ')}`;
  return `${who} never came to ${describeEntry(entry!)}, in which rank ${rank} has waited for ${Math.round(entry!.agoMs)} ms`;
}
