import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { parseJson, readJsonFile } from '../../src/model/json.js';
import { tempDir } from '../helpers/tempdir.js';

const parse = (text: string) => parseJson(Buffer.from(text));

describe('JSON from others', () => {
  it('is what JSON.parse makes of it', () => {
    fc.assert(
      fc.property(fc.json({ maxDepth: 6 }), (text) => {
        expect(parse(text)).toEqual(JSON.parse(text));
      }),
    );
  });

  it('is refused whenever JSON.parse refuses it, without running away', () => {
    const text = fc.string({ unit: fc.constantFrom(...'{}[]",:\\u01ae \n'), maxLength: 30 });
    fc.assert(
      fc.property(text, (broken) => {
        let valid = true;
        try {
          JSON.parse(broken);
        } catch {
          valid = false;
        }
        if (!valid) expect(() => parse(broken)).toThrow();
      }),
      { numRuns: 500 },
    );
  });

  it.each([
    '{"a":1,"a":1}',
    '{"a":1,"\\u0061":2}',
    '[{"b":{"a":[],"c":0,"a":{}}}]',
    '{"":1,"":2}',
    '{"__proto__":1,"__proto__":2}',
  ])('with a key twice is refused: %s', (text) => {
    JSON.parse(text);
    expect(() => parse(text)).toThrow(/twice/);
  });

  it.each([
    '{"a":"a","b":["a","a"]}',
    '[{"a":1},{"a":1}]',
    '{"a":{"a":{"a":"a:"}}}',
    '{"a\\"":1,"a":2,"a\\\\":3}',
  ])('with a word twice, but not as a key, is fine: %s', (text) => {
    expect(parse(text)).toEqual(JSON.parse(text));
  });

  it('nested too deep is refused before anything is built', () => {
    expect(() => parse('['.repeat(50_000_000))).toThrow(/nested more than 64 deep/);
  });

  it('in a file is refused with the file', () => {
    const path = join(tempDir(), 'x.json');
    writeFileSync(path, Buffer.from([0x22, 0xff, 0x22]));
    expect(() => readJsonFile(path)).toThrow(expect.objectContaining({ code: 'TP_JSON', exitCode: 2 }));
    expect(() => readJsonFile(path)).toThrow(path);
  });
});
