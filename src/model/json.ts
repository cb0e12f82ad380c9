// JSON as it should be read from files that others wrote: UTF-8 or nothing, and no key twice.

import { readFileSync } from 'node:fs';
import { fail, shown } from '../errors.js';

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

/** Deeper than any file we read; parsing a hundred million brackets would take gigabytes. */
const MAX_DEPTH = 64;

/**
 * Parses UTF-8 bytes. Throws a plain Error for bytes that are not UTF-8, text that is not JSON, nesting below MAX_DEPTH,
 * and an object with a key twice: JSON.parse keeps the last one, other readers the first, and then two programs see
 * two different files.
 */
export function parseJson(bytes: Uint8Array): unknown {
  const text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  checkKeysAndDepth(text);
  return JSON.parse(text);
}

/** Looks at brackets and strings only, before anything is built; JSON.parse judges all the rest. */
function checkKeysAndDepth(text: string): void {
  const open: (Set<string> | null)[] = []; // keys of the objects around us, null for an array
  let atKey = false;
  for (let i = 0; i < text.length; i++) {
    switch (text[i]) {
      case '{':
      case '[':
        atKey = text[i] === '{';
        open.push(atKey ? new Set() : null);
        if (open.length > MAX_DEPTH) throw new Error(`it is nested more than ${MAX_DEPTH} deep`);
        break;
      case '}':
      case ']':
        open.pop();
        break;
      case ',':
        atKey = Boolean(open.at(-1));
        break;
      case ':':
        atKey = false;
        break;
      case '"': {
        const start = i;
        for (i++; i < text.length && text[i] !== '"'; i++) if (text[i] === '\\') i++;
        const keys = atKey ? open.at(-1) : null;
        if (!keys) break;
        const key = JSON.parse(text.slice(start, i + 1)) as string; // "\u0061" and "a" are one key
        if (keys.has(key)) throw new Error(`key ${shown(key)} stands twice in one object`);
        keys.add(key);
      }
    }
  }
}
