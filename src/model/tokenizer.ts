// Text <-> token ids, by the tokenizer.json of a checkpoint.

import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { Tokenizer as HubTokenizer } from '@huggingface/tokenizers';
import { fail } from '../errors.js';
import { readJsonFile } from './json.js';

export class Tokenizer {
  readonly #hub: HubTokenizer;
  readonly #bos: number;

  /** `bosTokenId`: the token that every prompt starts with. */
  constructor(hub: HubTokenizer, bosTokenId: number) {
    this.#hub = hub;
    this.#bos = bosTokenId;
  }

  /** The ids of a text as it stands: special tokens written in it are recognised, none is added. */
  encode(text: string): number[] {
    return this.#hub.encode(text, { add_special_tokens: false }).ids;
  }

  /** The ids of a raw prompt: `encode` with the BOS token in front, exactly once; without it the model rambles. */
  encodePrompt(text: string): number[] {
    const ids = this.encode(text);
    return ids[0] === this.#bos ? ids : [this.#bos, ...ids];
  }

  /** The text of ids, without the special tokens or with them. */
  decode(ids: readonly number[], skipSpecial = true): string {
    if (ids.length === 0) return '';
    return this.#hub.decode([...ids], {
      skip_special_tokens: skipSpecial,
      clean_up_tokenization_spaces: false, // it would make a token's text depend on later ones
    });
  }
}

/** The tokenizer of a checkpoint folder, or null when it has none. TP_JSON, TP_TOKENIZER. */
export function loadTokenizer(dir: string, bosTokenId: number): Tokenizer | null {
  const path = join(dir, 'tokenizer.json');
  if (!existsSync(path)) return null;
  const config = join(dir, 'tokenizer_config.json');
  const json = readJsonFile(path) as object;
  const settings = existsSync(config) ? (readJsonFile(config) as object) : {};
  try {
    return new Tokenizer(new HubTokenizer(json, settings), bosTokenId);
  } catch (error) {
    throw fail('TP_TOKENIZER', path, (error as Error).message);
  }
}

/** For a text prompt: the tokenizer of the checkpoint folder `dir`, or TP_TOKENIZER_MISSING. */
export function requireTokenizer(dir: string, bosTokenId: number): Tokenizer {
  const tokenizer = loadTokenizer(dir, bosTokenId);
  if (!tokenizer) throw fail('TP_TOKENIZER_MISSING', dir);
  return tokenizer;
}

/**
 * Text of a growing list of ids, piece by piece. The bytes of a character may be spread over several tokens, so what
 * could still become one is held back; the pieces together are the text of all ids.
 */
export class TextStream {
  readonly #tokenizer: Tokenizer;
  readonly #skipSpecial: boolean;
  /** The ids since the last but one character boundary: a token's text may depend on the one before. */
  #ids: number[] = [];
  /** How many of them lie before the last boundary. */
  #context = 0;
  #given = '';

  constructor(tokenizer: Tokenizer, skipSpecial = true) {
    this.#tokenizer = tokenizer;
    this.#skipSpecial = skipSpecial;
  }

  /** Takes one id and returns the text that is certain now, often ''. */
  push(id: number): string {
    this.#ids.push(id);
    const text = this.#text();
    // Bytes that are no character yet show as one U+FFFD at the end; those before it will never be one.
    if (text.endsWith('\ufffd')) return this.#give(text.slice(0, -1));
    const piece = this.#give(text);
    this.#ids = this.#ids.slice(this.#context);
    this.#context = this.#ids.length;
    this.#given = this.#text();
    return piece;
  }

  /** The rest, after the last id: bytes that did not become a character come out as U+FFFD. */
  end(): string {
    return this.#give(this.#text());
  }

  #text(): string {
    return this.#tokenizer.decode(this.#ids, this.#skipSpecial);
  }

  #give(text: string): string {
    const piece = text.slice(this.#given.length);
    this.#given = text;
    return piece;
  }
}
