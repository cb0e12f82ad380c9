// Every kind of slice, from a file and from a seed. What an engine holds is seen through `embed`: in float32 and with
// scale 1 it copies rows of the table.

import { closeSync, ftruncateSync, openSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { syntheticElement } from '../../src/model/synthetic.js';
import { type NativeEngine, type NativeSlice, native } from '../../src/native.js';
import { batchOf, engineSpec, fromBfloat16, step, targets } from '../helpers/op.js';
import { freshRandom } from '../helpers/op-random.js';
import { tempDir } from '../helpers/tempdir.js';

const random = freshRandom();

const closing: (() => void)[] = [];
afterEach(() => {
  for (const close of closing.splice(0)) close();
});

const sizeOf = (axes: readonly number[]) => axes.reduce((n, d) => n * d, 1);
const boxOf = ({ start, stop }: NativeSlice) => start.map((from, axis) => stop[axis]! - from);

/** A table of at most 64 tokens, so that one step reads it all. */
function tableOf(elements: number): [vocab: number, hidden: number] {
  const vocab = [64, 60, 48, 40, 7, 5, 3, 2].find((n) => elements % n === 0) ?? 1;
  return [vocab, elements / vocab];
}

/** An engine with one tensor of as many elements as the slice has. */
function holder(slice: NativeSlice, target = targets[0]!): NativeEngine {
  const shape = tableOf(sizeOf(boxOf(slice)));
  const plan = {
    model: { vocab: shape[0], hidden: shape[1] },
    steps: [{ ...step('embed', 'table'), layer: -1 }],
    weights: { table: { shape } },
  };
  const engine = new (native().Engine)({ ...engineSpec(plan, 'float32', target), layers: [] });
  closing.push(() => engine.close());
  return engine;
}

/** The elements of its tensor. */
async function held(engine: NativeEngine, elements: number): Promise<Float32Array> {
  await engine.prepare();
  const tokens = Array.from({ length: tableOf(elements)[0] }, (_, t) => t);
  engine.begin(batchOf({ tokens, positions: tokens.map(() => 0) }));
  await engine.run(0);
  return engine.readBuffer('hidden');
}

/** Flat indices of a slice's elements, in order. */
function* indices({ shape, start, stop }: NativeSlice): Generator<number> {
  const at = [...start];
  for (;;) {
    yield at.reduce((flat, i, axis) => flat * shape[axis]! + i, 0);
    let axis = at.length - 1;
    while (axis >= 0 && ++at[axis]! === stop[axis]!) {
      at[axis] = start[axis]!;
      axis--;
    }
    if (axis < 0) return;
  }
}

const box = (shape: number[], start: number[], stop: number[]): NativeSlice => ({ shape, start, stop });

/** A 64 KB run is read where it belongs, shorter ones are picked out of 4 MB blocks unless a page lies between. */
const SLICES: [string, NativeSlice][] = [
  ['one element', box([3, 5], [2, 4], [3, 5])],
  ['everything', box([12, 10], [0, 0], [12, 10])],
  ['rows', box([12, 10], [3, 0], [9, 10])],
  ['columns', box([12, 10], [0, 5], [12, 10])],
  ['a column of a wide matrix', box([40, 5000], [0, 4999], [40, 5000])],
  ['rows and columns', box([9, 14], [2, 7], [7, 14])],
  ['the middle axis', box([6, 8, 5], [0, 2, 0], [6, 4, 5])],
  ['the last of three axes', box([6, 8, 10], [0, 0, 5], [6, 8, 10])],
  ['the third of four axes', box([3, 2, 8, 5], [0, 0, 4, 0], [3, 2, 8, 5])],
  ['axes of 1', box([1, 4, 1, 6], [0, 1, 0, 3], [1, 3, 1, 6])],
  ['a vector', box([100], [37], [77])],
  ['long rows that are read in place', box([7, 40_000], [2, 0], [5, 40_000])],
  ['long parts of rows', box([5, 80_000], [0, 40_000], [5, 80_000])],
  ['one run of several pieces', box([6, 900_000], [1, 0], [4, 900_000])],
  ['short runs over several blocks', box([3000, 1500], [0, 750], [3000, 1500])],
  ['short runs more than a page apart', box([50, 6000], [0, 3000], [50, 3100])],
];

describe.each(SLICES)('a slice of %s', (_, slice) => {
  const elements = sizeOf(boxOf(slice));

  it('is read from a file, behind a header of odd size', async () => {
    const stored = Uint16Array.from({ length: sizeOf(slice.shape) }, (_, i) => (i * 40503) & 0x3fff);
    const offset = 1 + random.below(1000);
    const fd = openSync(join(tempDir(), 'tensor'), 'w+');
    closing.push(() => closeSync(fd));
    writeSync(fd, stored, 0, stored.byteLength, offset);
    const engine = holder(slice);
    await engine.readTensor('table', slice, fd, offset);
    const want = fromBfloat16(Uint16Array.from(indices(slice), (i) => stored[i]!));
    expect(Buffer.from((await held(engine, elements)).buffer).equals(Buffer.from(want.buffer))).toBe(true);
  });

  it('is made from a seed', async () => {
    const key = random.key();
    const scale = { scale: 2 ** -18, offset: 0.5 };
    const engine = holder(slice);
    await engine.synthesize('table', slice, key, scale.scale, scale.offset);
    const got = await held(engine, elements);
    let wrong = 0;
    let i = 0;
    // The definition is slow: of a large slice every 97th element and the last.
    for (const index of indices(slice)) {
      if (elements < 10_000 || i % 97 === 0 || i === elements - 1)
        wrong += got[i] === syntheticElement(index, key, scale) ? 0 : 1;
      i++;
    }
    expect(i).toBe(elements);
    expect(wrong).toBe(0);
  });
});

describe('beyond 2^32 elements', () => {
  const far = box([3, 2 ** 31, 3], [1, 2 ** 30 - 20, 1], [3, 2 ** 30 + 20, 3]);

  it.each([
    ['a run across the border', box([2 ** 33], [2 ** 32 - 100], [2 ** 32 + 140])],
    ['runs on both sides', far],
  ])('%s is made from a seed by its definition', async (_, slice) => {
    const key = random.key();
    const scale = { scale: 2 ** -15, offset: 0 };
    const engine = holder(slice);
    await engine.synthesize('table', slice, key, scale.scale, scale.offset);
    const want = Float32Array.from(indices(slice), (i) => syntheticElement(i, key, scale));
    expect(await held(engine, want.length)).toEqual(want);
  });

  it('rows are read from a file of more than 8 GB', async () => {
    const slice = box([2 ** 31, 3], [2 ** 31 - 40, 0], [2 ** 31, 3]);
    const stored = Uint16Array.from({ length: 120 }, (_, i) => 0x3f80 + i);
    const path = join(tempDir(), 'tensor');
    const fd = openSync(path, 'w+');
    closing.push(() => closeSync(fd));
    writeSync(fd, stored, 0, stored.byteLength, 2 * (sizeOf(slice.shape) - 120)); // a hole before it
    const engine = holder(slice);
    await engine.readTensor('table', slice, fd, 0);
    expect(await held(engine, 120)).toEqual(fromBfloat16(stored));
  });
});

describe('the numbers of a seed', () => {
  it.each(targets)('are those of the definition on $name', async (target) => {
    const slice = box([40, 33], [0, 0], [40, 33]);
    const key = random.key();
    const scale = { scale: 2 ** -17, offset: 1 };
    const engine = holder(slice, target);
    await engine.synthesize('table', slice, key, scale.scale, scale.offset);
    const want = Float32Array.from({ length: 40 * 33 }, (_, i) => syntheticElement(i, key, scale));
    expect(await held(engine, want.length)).toEqual(want);
  });

  it.each([0, 1, 1000, 2 ** 32 - 25, 2 ** 32, 2 ** 40 + 7, 2 ** 52])(
    'are the same in the addon’s function, from index %i',
    (start) => {
      const key = random.key();
      const scale = { scale: 2 ** -16, offset: -0.25 };
      const out = new Uint16Array(50);
      native().synthesize(out, start, key, scale.scale, scale.offset);
      expect([...fromBfloat16(out)]).toEqual(
        Array.from({ length: 50 }, (_, i) => syntheticElement(start + i, key, scale)),
      );
    },
  );
});

describe('what cannot be loaded', () => {
  const slice = box([8, 10], [2, 0], [6, 10]);

  function file(bytes: number): number {
    const fd = openSync(join(tempDir(), 'tensor'), 'w+');
    closing.push(() => closeSync(fd));
    ftruncateSync(fd, bytes);
    return fd;
  }

  it.each([
    ['short runs', box([8, 10], [2, 5], [6, 10]), 118],
    ['whole rows', slice, 119],
    ['long rows', box([4, 40_000], [0, 0], [3, 40_000]), 239_998],
    ['anything', slice, 0],
  ])('because the file ends too early for %s', async (_, cut, bytes) => {
    const engine = holder(cut);
    await expect(engine.readTensor('table', cut, file(bytes), 0)).rejects.toMatchObject({
      code: 'TP_WEIGHTS_READ',
      message: expect.stringMatching(new RegExp(`ends at byte ${bytes}\\b`)),
    });
    await expect(engine.prepare()).rejects.toMatchObject({
      code: 'TP_PLAN',
      message: expect.stringMatching(/table was never loaded/),
    });
  });

  it('because the descriptor is not open for reading', async () => {
    await expect(holder(slice).readTensor('table', slice, 9999, 0)).rejects.toMatchObject({
      code: 'TP_WEIGHTS_READ',
      message: expect.stringMatching(/Bad file descriptor/),
    });
  });

  it.each<[string, string, NativeSlice, RegExp]>([
    ['a name that is not planned', 'chair', slice, /tensor chair is not in the plan/],
    ['fewer elements than planned', 'table', box([8, 10], [2, 0], [5, 10]), /30 elements, the plan says 40/],
    ['an end past the axis', 'table', box([8, 10], [5, 0], [9, 10]), /axis 0 is \[5, 9\) of 8/],
    ['a start below 0', 'table', box([8, 10], [0, -1], [4, 9]), /axis 1 is \[-1, 9\) of 10/],
    ['a start behind its stop', 'table', box([8, 10], [6, 0], [2, 10]), /axis 0 is \[6, 2\) of 8/],
    [
      'axes that differ in number',
      'table',
      box([8, 10], [2], [6, 10]),
      /shape, start and stop of one length/,
    ],
    ['no axes', 'table', box([], [], []), /shape, start and stop of one length/],
  ])('because the slice has %s', async (_, name, wrong, text) => {
    const engine = holder(slice);
    const load = async () => engine.synthesize(name, wrong, [1, 2], 1, 0);
    await expect(load()).rejects.toMatchObject({ code: 'TP_PLAN', message: expect.stringMatching(text) });
    const read = async () => engine.readTensor(name, wrong, file(160), 0);
    await expect(read()).rejects.toMatchObject({ code: 'TP_PLAN', message: expect.stringMatching(text) });
  });
});
