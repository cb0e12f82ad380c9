// Checked reading of a JSON object, field by field: every refusal names the file, the key and the value found.

import { fail, listOf } from '../errors.js';
import { isObject, type JsonObject } from './json.js';

type Scalar = string | number | boolean | null;

/** A JSON object whose fields are taken one by one; `unread` tells what nobody asked for. */
export class Fields {
  readonly #json: JsonObject;
  readonly #read = new Set<string>();

  /** `where` stands before the key in messages: `config.json: text_config.`. TP_CONFIG_FIELD when `json` is no object. */
  constructor(
    readonly where: string,
    json: unknown,
  ) {
    if (!isObject(json))
      throw fail('TP_CONFIG_FIELD', where.replace(/[:. ]+$/, ''), 'be a JSON object', json);
    this.#json = json;
  }

  has(key: string): boolean {
    this.#read.add(key);
    return Object.hasOwn(this.#json, key) && this.#json[key] !== null;
  }

  /** The value as it stands; undefined when absent. */
  raw(key: string): unknown {
    this.#read.add(key);
    return Object.hasOwn(this.#json, key) ? this.#json[key] : undefined;
  }

  /** A field that must be there. */
  required(key: string): unknown {
    const value = this.raw(key);
    if (value === undefined || value === null) this.refuse(key, 'be given', value);
    return value;
  }

  /** A whole number in [from, to]. */
  integer(key: string, from: number, to: number, absent?: number): number {
    const value = this.raw(key) ?? absent;
    if (!Number.isSafeInteger(value) || (value as number) < from || (value as number) > to)
      this.refuse(key, `be a whole number from ${from} to ${to}`, value);
    return value as number;
  }

  /** A finite number in (above, to]. */
  number(key: string, above: number, to: number, absent?: number): number {
    const value = this.raw(key) ?? absent;
    if (typeof value !== 'number' || !(value > above && value <= to))
      this.refuse(key, `be a number above ${above} and at most ${to}`, value);
    return value as number;
  }

  flag(key: string, absent: boolean): boolean {
    const value = this.raw(key) ?? absent;
    if (typeof value !== 'boolean') this.refuse(key, 'be true or false', value);
    return value as boolean;
  }

  object(key: string): Fields {
    return new Fields(`${this.where}${key}.`, this.required(key));
  }

  /** A feature that tp-run has in one form only. `absent`: what leaving the key out means to Hugging Face. */
  fixed(key: string, allowed: readonly Scalar[], absent: Scalar): void {
    const value = this.raw(key);
    if (allowed.includes((value === undefined ? absent : value) as Scalar)) return;
    const need = `tp-run needs ${listOf(allowed.map((a) => JSON.stringify(a)))}`;
    const why = value === undefined ? `leaving it out means ${JSON.stringify(absent)}, ${need}` : need;
    throw fail('TP_CONFIG_UNSUPPORTED', this.where, key, value, why);
  }

  /** Says that `key` must `what`, and what was found. */
  refuse(key: string, what: string, found: unknown): never {
    throw fail('TP_CONFIG_FIELD', `${this.where}${key}`, what, found);
  }

  /** Keys that no call has read, with their values. */
  unread(): [key: string, value: unknown][] {
    return Object.entries(this.#json).filter(([key]) => !this.#read.has(key));
  }
}
