// Chat messages -> the text a chat model was trained on, by the template that ships with its checkpoint.

import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Template } from '@huggingface/jinja';
import { fail } from '../errors.js';
import { isObject, type JsonObject, readJsonFile } from './json.js';

export interface ChatMessage {
  role: string;
  content: string;
}

export interface ChatOptions {
  /** End with the opening of the model's turn. */
  addGenerationPrompt: boolean;
  /** Let the model think before it answers. */
  enableThinking: boolean;
}

/** Far above any template; they are programs that somebody else wrote. */
const MAX_TEMPLATE = 1 << 20;

export class ChatTemplate {
  readonly #path: string;
  readonly #template: Template;
  readonly #tokens: JsonObject;

  /** `tokens`: special tokens by the names that templates use, e.g. `bos_token`. TP_CHAT_TEMPLATE. */
  constructor(path: string, source: string, tokens: JsonObject) {
    this.#path = path;
    this.#tokens = tokens;
    if (source.length > MAX_TEMPLATE)
      throw fail('TP_CHAT_TEMPLATE', path, `it has ${source.length} characters`);
    this.#template = this.#try(() => new Template(source));
  }

  /** The prompt's text. It holds its BOS token itself: encode it as it is. TP_CHAT_TEMPLATE. */
  render(messages: readonly ChatMessage[], options: ChatOptions): string {
    return this.#try(() =>
      this.#template.render({
        ...this.#tokens,
        messages,
        add_generation_prompt: options.addGenerationPrompt,
        enable_thinking: options.enableThinking,
      }),
    );
  }

  #try<T>(action: () => T): T {
    try {
      return action();
    } catch (error) {
      throw fail('TP_CHAT_TEMPLATE', this.#path, (error as Error).message);
    }
  }
}

/** The chat template of a checkpoint folder. TP_CHAT_TEMPLATE_MISSING, TP_CHAT_TEMPLATE, TP_JSON. */
export function loadChatTemplate(dir: string): ChatTemplate {
  const config = join(dir, 'tokenizer_config.json');
  const settings = existsSync(config) ? readJsonFile(config) : {};
  const tokens = isObject(settings) ? specialTokens(settings) : {};
  const path = join(dir, 'chat_template.jinja');
  if (existsSync(path)) return new ChatTemplate(path, readFileSync(path, 'utf8'), tokens);
  if (isObject(settings) && typeof settings.chat_template === 'string')
    return new ChatTemplate(config, settings.chat_template, tokens);
  throw fail('TP_CHAT_TEMPLATE_MISSING', dir);
}

/** `bos_token`, `eos_token` ...: stored as text, or as an object with the text in `content`. */
function specialTokens(settings: JsonObject): JsonObject {
  return Object.fromEntries(
    Object.entries(settings)
      .filter(([key]) => key.endsWith('_token'))
      .map(([key, value]) => [key, isObject(value) ? value.content : value]),
  );
}
