// Shows tokens as they come. Several prompts decode together but are read one after another, so the tokens of later
// ones wait until the earlier ones are done.

import { TextStream, type Tokenizer } from '../model/tokenizer.js';
import { print } from './output.js';

export class TokenPrinter {
  readonly #prompts: number;
  readonly #streams: TextStream[] | null;
  /** What each prompt has to say that is not printed yet. */
  readonly #waiting: string[];
  readonly #done: boolean[];
  #current = 0;

  /** Prints text with a tokenizer, ids without. */
  constructor(prompts: number, tokenizer: Tokenizer | null) {
    this.#prompts = prompts;
    this.#streams = tokenizer && Array.from({ length: prompts }, () => new TextStream(tokenizer));
    this.#waiting = Array.from({ length: prompts }, (_, i) => (prompts > 1 ? `[${i}] ` : ''));
    this.#done = Array.from({ length: prompts }, () => false);
  }

  push(prompt: number, token: number, last: boolean): void {
    const stream = this.#streams?.[prompt];
    this.#waiting[prompt] += stream
      ? stream.push(token) + (last ? stream.end() : '')
      : `${token}${last ? '' : ' '}`;
    this.#done[prompt] = last;
    while (this.#current < this.#prompts) {
      const text = this.#waiting[this.#current]!;
      this.#waiting[this.#current] = '';
      if (text) print(text);
      if (!this.#done[this.#current]) return;
      print('\n');
      this.#current++;
    }
  }
}
