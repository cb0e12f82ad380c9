import { describe, expect, it } from 'vitest';
import {
  compareRecords,
  describeEntry,
  FlightRecorder,
  MOST_RECORDED,
  type RecordedCollective,
} from '../../src/comm/flight-recorder.js';

const entry = (n: number, more: Partial<RecordedCollective> = {}): RecordedCollective => ({
  place: n,
  n,
  op: 'allReduce',
  layer: 3,
  stage: 'down',
  bytes: 64,
  agoMs: 700,
  tookMs: 1,
  ...more,
});

describe('a flight recorder', () => {
  it('keeps the latest, in order, and says which is under way', () => {
    const recorder = new FlightRecorder();
    for (let i = 0; i < 100; i++) recorder.begin('allReduce', i, 'down', 8, i + 1)();
    recorder.begin('gather', -1, 'sample', 16, 101);
    const entries = recorder.entries();
    expect(entries).toHaveLength(MOST_RECORDED);
    expect(entries.map(({ n }) => n)).toEqual(Array.from({ length: MOST_RECORDED }, (_, i) => 70 + i));
    expect(entries.at(-1)).toMatchObject({ op: 'gather', stage: 'sample', bytes: 16, tookMs: null });
    expect(entries.slice(0, -1).every(({ tookMs, agoMs }) => tookMs !== null && agoMs >= tookMs)).toBe(true);
  });

  it('calls a collective by the number that the collective itself gives it, whatever ran between', () => {
    const recorder = new FlightRecorder();
    recorder.begin('gather', -1, 'burst length', 4, 7)();
    recorder.begin('16 steps', -1, 'on the device', 0, null)();
    recorder.begin('gather', -1, 'burst length', 4, 8)();
    expect(recorder.entries().map(describeEntry)).toEqual([
      'gather #7 (burst length, 4 bytes)',
      '16 steps (on the device)',
      'gather #8 (burst length, 4 bytes)',
    ]);
  });
});

describe('records side by side', () => {
  const compare = (...records: RecordedCollective[][]) => compareRecords(new Map(records.entries()));

  it('show nothing when all ranks are at the same place', () => {
    expect(compare([entry(1), entry(2)], [entry(1), entry(2)])).toBe(null);
    expect(compare([entry(1, { tookMs: null })], [entry(1, { tookMs: null })])).toBe(null);
    expect(compare([entry(1)])).toBe(null);
    expect(compare()).toBe(null);
  });

  it('show who never came', () => {
    const waiting = [entry(1), entry(2, { tookMs: null })];
    expect(compare(waiting, [entry(1)])).toBe(
      'rank 1 never came to allReduce #2 (layer 3 down, 64 bytes), in which rank 0 has waited for 700 ms',
    );
    expect(compare([], waiting, [entry(1)], waiting)).toMatch(
      /^ranks 0, 2 never came to .* which rank 1 has/,
    );
  });

  it('show who never began what runs on the device', () => {
    const steps = { op: '16 steps', layer: -1, stage: 'on the device', bytes: 0, n: null };
    expect(compare([entry(1), entry(2, { ...steps, tookMs: null })], [entry(1)])).toBe(
      'rank 1 never came to 16 steps (on the device), in which rank 0 has waited for 700 ms',
    );
  });

  it('show the first collective whose size or kind differs, and not what follows from it', () => {
    expect(
      compare([entry(1), entry(2, { bytes: 128 })], [entry(1), entry(2), entry(3, { op: 'gather' })]),
    ).toBe(
      'rank 0 is at allReduce #2 (layer 3 down, 128 bytes), rank 1 at allReduce #2 (layer 3 down, 64 bytes)',
    );
    expect(compare([entry(4, { layer: -1, stage: 'sample', op: 'gather' })], [entry(4)])).toMatch(
      /^rank 0 is at gather #4 \(sample, 64 bytes\), rank 1 at allReduce #4/,
    );
  });
});
