// JSON as it should be read from files that others wrote: UTF-8 or nothing, and no key twice.

import { readFileSync } from 'node:fs';
import { fail } from '../errors.js';

export type JsonObject = Record<string, unknown>;

export const isObject = (value: unknown): value is JsonObject =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

/** Reads and parses a JSON file. TP_FILE_UNREADABLE, TP_JSON. */
export function readJsonFile(path: string): unknown {
  let bytes: Buffer;
  try {
    bytes = readFileSync(path);
  } catch (error) {
    throw fail('TP_FILE_UNREADABLE', path, (error as Error).message);
  }
  try {
    return parseJson(bytes);
  } catch (error) {
    throw fail('TP_JSON', path, (error as Error).message);
  }
}

/**
 * Parses UTF-8 bytes. Throws a plain Error for bytes that are not UTF-8, text that is not JSON, and an object with a key
 * twice: JSON.parse keeps the last one, other readers the first, and then two programs see two different files.
 */
export function parseJson(bytes: Uint8Array): unknown {
  const text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  const value: unknown = JSON.parse(text);
  const twice = duplicateKey(text);
  if (twice !== null) throw new Error(`key ${JSON.stringify(twice)} stands twice in one object`);
  return value;
}

/** The first key that an object of a *valid* JSON text repeats. A loop, not a recursion: nesting may be deep. */
function duplicateKey(text: string): string | null {
  const open: (Set<string> | null)[] = []; // keys of the objects around us, null for an array
  let atKey = false;
  for (let i = 0; i < text.length; i++) {
    switch (text[i]) {
      case '{':
        open.push(new Set());
        atKey = true;
        break;
      case '[':
        open.push(null);
        atKey = false;
        break;
      case '}':
      case ']':
        open.pop();
        break;
      case ',':
        atKey = open.at(-1) !== null;
        break;
      case ':':
        atKey = false;
        break;
      case '"': {
        const start = i;
        for (i++; text[i] !== '"'; i++) if (text[i] === '\\') i++;
        if (!atKey) break;
        const key = JSON.parse(text.slice(start, i + 1)) as string; // "\u0061" and "a" are one key
        if (open.at(-1)!.has(key)) return key;
        open.at(-1)!.add(key);
      }
    }
  }
  return null;
}
