import { execFileSync } from 'node:child_process';
import {
  mkdirSync,
  readdirSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { TpError } from '../../src/errors.js';
import { DTYPE_BYTES, SafetensorsFile, type StoredDtype } from '../../src/model/safetensors.js';
import { requireWritable, SafetensorsWriter } from '../../src/model/writer.js';
import { file, MALFORMED } from '../helpers/malformed.js';
import { tempDir } from '../helpers/tempdir.js';

const input = (code: string) => expect.objectContaining({ code, exitCode: 2 });
const written = (bytes: Buffer): string => {
  const path = join(tempDir(), 'x.safetensors');
  writeFileSync(path, bytes);
  return path;
};

describe('a malformed safetensors file', () => {
  it.each(MALFORMED)('with %s is refused', (_, bytes, reason) => {
    const path = written(bytes);
    expect(() => new SafetensorsFile(path)).toThrow(input('TP_SAFETENSORS'));
    expect(() => new SafetensorsFile(path)).toThrow(reason);
  });

  it('leaves no descriptor open', () => {
    const path = written(MALFORMED[0]![1]);
    const before = readdirSync('/proc/self/fd').length;
    for (let i = 0; i < 20; i++) expect(() => new SafetensorsFile(path)).toThrow();
    expect(readdirSync('/proc/self/fd').length).toBeLessThanOrEqual(before);
  });

  it('never brings more than a coded error, whatever its bytes', () => {
    const whole = file(
      {
        __metadata__: { format: 'pt' },
        a: { dtype: 'BF16', shape: [2, 3], data_offsets: [0, 12] },
        b: { dtype: 'F32', shape: [], data_offsets: [12, 16] },
      },
      Buffer.alloc(16),
    );
    const path = written(whole);
    expect(new SafetensorsFile(path).tensors.size).toBe(2);
    const edit = fc.tuple(fc.nat(whole.length - 1), fc.nat(255));
    const edits = fc.array(edit, { minLength: 1, maxLength: 4 });
    fc.assert(
      fc.property(edits, fc.option(fc.nat(whole.length)), (changes, cut) => {
        const bytes = Buffer.from(whole);
        for (const [at, byte] of changes) bytes[at] = byte;
        writeFileSync(path, bytes.subarray(0, cut ?? bytes.length));
        try {
          new SafetensorsFile(path).close();
        } catch (error) {
          expect(error).toBeInstanceOf(TpError);
        }
      }),
      { numRuns: 500 },
    );
  }, 60_000);
});

describe('a safetensors file', () => {
  it('that is a folder, a pipe or not there is refused without waiting', () => {
    const dir = tempDir();
    mkdirSync(join(dir, 'folder'));
    for (const name of ['folder', 'nothing'])
      expect(() => new SafetensorsFile(join(dir, name))).toThrow(input('TP_FILE_UNREADABLE'));
    expect(() => new SafetensorsFile('/dev/null')).toThrow(input('TP_FILE_UNREADABLE'));
  });

  const opened = () => {
    const path = written(
      file({ a: { dtype: 'BF16', shape: [2], data_offsets: [0, 4] } }, Buffer.from('abcd')),
    );
    return { path, stored: new SafetensorsFile(path) };
  };

  it('that stays the same says so', () => {
    const { stored } = opened();
    expect(stored.read('a').toString()).toBe('abcd');
    expect(() => stored.requireUnchanged()).not.toThrow();
    stored.close();
  });

  it.each<[string, (path: string) => void, RegExp]>([
    ['is removed', (path) => rmSync(path), /removed/],
    ['is written to', (path) => utimesSync(path, 1, 1), /written to/],
    ['becomes shorter', (path) => truncateSync(path, 20), /written to/],
    [
      'is replaced',
      (path) => {
        writeFileSync(`${path}.new`, file({}));
        renameSync(`${path}.new`, path);
      },
      /another file/,
    ],
  ])('that %s after it was opened is noticed', (_, change, reason) => {
    const { path, stored } = opened();
    change(path);
    expect(() => stored.requireUnchanged()).toThrow(input('TP_FILE_CHANGED'));
    expect(() => stored.requireUnchanged()).toThrow(reason);
    stored.close();
  });

  it('that becomes shorter is not read past its end', () => {
    const { path, stored } = opened();
    truncateSync(path, statSync(path).size - 1);
    expect(() => stored.read('a')).toThrow(input('TP_FILE_CHANGED'));
    stored.close();
  });
});

describe('what the writer writes', () => {
  const dtype = fc.constantFrom(...(Object.keys(DTYPE_BYTES) as StoredDtype[]));
  const shape = fc.array(fc.integer({ min: 1, max: 5 }), { maxLength: 4 });
  const name = fc.string({ unit: 'binary' }).filter((n) => n !== '__metadata__');
  const tensors = fc.uniqueArray(fc.record({ name, dtype, shape }), {
    selector: (t) => t.name,
    maxLength: 8,
  });
  const metadata = fc.dictionary(fc.string(), fc.string(), { noNullPrototype: true });

  it('is what the reader reads', () => {
    const path = join(tempDir(), 'x.safetensors');
    fc.assert(
      fc.property(tensors, metadata, (list, info) => {
        const writer = new SafetensorsWriter(path, list, info);
        const data = list.map((t, i) =>
          Buffer.alloc(
            t.shape.reduce((n, d) => n * d, DTYPE_BYTES[t.dtype]),
            i + 1,
          ),
        );
        for (const bytes of data) {
          writer.write(bytes.subarray(0, 1));
          writer.write(bytes.subarray(1));
        }
        writer.finish();
        const stored = new SafetensorsFile(path);
        expect(Object.fromEntries(stored.metadata)).toEqual(Object.fromEntries(Object.entries(info)));
        expect(stored.tensors.size).toBe(list.length);
        for (const [i, t] of list.entries()) {
          expect(stored.tensors.get(t.name)).toMatchObject({ dtype: t.dtype, shape: t.shape });
          expect(stored.read(t.name).equals(data[i]!)).toBe(true);
        }
        stored.close();
      }),
      { numRuns: 100 },
    );
  }, 60_000);

  it('has its data at a multiple of 8 and appears only when it is whole', () => {
    const path = join(tempDir(), 'x.safetensors');
    const writer = new SafetensorsWriter(path, [{ name: 'abc', dtype: 'F32', shape: [1] }]);
    expect(statSync(path, { throwIfNoEntry: false })).toBeUndefined();
    writer.write(Buffer.alloc(4));
    writer.finish();
    const stored = new SafetensorsFile(path);
    expect(stored.tensors.get('abc')!.offset % 8).toBe(0);
    stored.close();
  });

  it('is nothing when it was not finished', () => {
    const dir = tempDir();
    const tensors = [{ name: 'a', dtype: 'F32', shape: [2] }] as const;
    new SafetensorsWriter(join(dir, 'x'), tensors).abort();
    expect(() => new SafetensorsWriter(join(dir, 'y'), tensors).finish()).toThrow(/8 bytes/);
    requireWritable(join(dir, 'z'));
    expect(readdirSync(dir)).toEqual([]);
  });

  it.each(['/proc/x.safetensors', '/nowhere/x.safetensors', '/dev/null', '/dev/full', '/tmp'])(
    'cannot go to %s, and that leaves nothing behind',
    (path) => {
      expect(() => requireWritable(path)).toThrow(input('TP_FILE_UNWRITABLE'));
      expect(() => new SafetensorsWriter(path, [])).toThrow(input('TP_FILE_UNWRITABLE'));
      expect(statSync('/dev/full').isCharacterDevice()).toBe(true);
    },
  );

  it('is nothing when the disk is full in the middle', () => {
    const dir = tempDir();
    // A limit on file sizes stands for a full disk: the same failing write, without being root.
    const limit = (bytes: number | 'unlimited') =>
      execFileSync('prlimit', ['--pid', `${process.pid}`, `--fsize=${bytes}:`]);
    const writer = new SafetensorsWriter(join(dir, 'x'), [{ name: 'a', dtype: 'U8', shape: [1 << 20] }]);
    limit(1 << 16);
    try {
      expect(() => writer.write(new Uint8Array(1 << 20))).toThrow(input('TP_FILE_UNWRITABLE'));
    } finally {
      limit('unlimited');
    }
    expect(readdirSync(dir)).toEqual([]);
  });

  it('cannot follow a link out to a device', () => {
    const dir = tempDir();
    symlinkSync('/dev/full', join(dir, 'x'));
    expect(() => requireWritable(join(dir, 'x'))).toThrow(input('TP_FILE_UNWRITABLE'));
    expect(readdirSync(dir)).toEqual(['x']);
  });
});
