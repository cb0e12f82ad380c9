// The prompts of a command as token ids, each checked against the model before anything starts.

import { readFileSync } from 'node:fs';
import { z } from 'zod';
import { fail } from '../errors.js';
import { type ChatTemplate, loadChatTemplate } from '../model/chat.js';
import type { ModelConfig } from '../model/config.js';
import { requireTokenizer, type Tokenizer } from '../model/tokenizer.js';
import { wholeNumber } from './flag.js';
import type { NamedModel } from './model.js';
import type { Options } from './options.js';

export interface Prompt {
  /** Its place on the command line or in the file, for messages. */
  where: string;
  ids: number[];
}

interface Draft {
  where: string;
  said: { text: string } | { ids: readonly (number | string)[] };
}

type Words = Pick<Options, 'prompt' | 'promptIds' | 'prompts' | 'chat' | 'maxModelLen'>;

const Row = z.union([
  z.object({ prompt: z.string(), prompt_ids: z.undefined().optional() }),
  z.object({ prompt_ids: z.array(z.number()), prompt: z.undefined().optional() }),
]);

/**
 * Every prompt in order: texts, ids, file; the model's own where none is given. `more` tokens must fit behind each.
 * Throws TP_PROMPT_*, TP_TOKENIZER_MISSING, TP_FLAG_VALUE, TP_FILE_UNREADABLE.
 */
export function readPrompts(options: Words, model: NamedModel, more: number): Prompt[] {
  const drafts: Draft[] = [
    ...options.prompt.map((text, i) => ({ where: `--prompt ${i + 1}`, said: { text } })),
    ...options.promptIds.map((text, i) => ({
      where: `--prompt-ids ${i + 1}`,
      said: { ids: splitIds(text) },
    })),
    ...(options.prompts === null ? [] : readFile(options.prompts)),
  ];
  if (drafts.length === 0) drafts.push(...defaults(model));
  const encode = encoder(options.chat, model);
  const context = contextOf(options.maxModelLen, model.config);
  return drafts.map(({ where, said }) => {
    const ids =
      'text' in said ? encode(said.text, where) : requireIds(said.ids, where, model.config.vocabSize);
    if (ids.length === 0) throw fail('TP_PROMPT_EMPTY', where);
    if (ids.length + more > context.tokens) {
      throw fail('TP_PROMPT_LENGTH', where, ids.length, more, context.tokens, context.limit);
    }
    return { where, ids };
  });
}

/** The longest context, and who says so. TP_FLAG_VALUE when the flag asks for more than the model has. */
function contextOf(flag: number | null, config: ModelConfig): { tokens: number; limit: string } {
  if (flag === null) return { tokens: config.maxPositions, limit: 'of the model' };
  if (flag > config.maxPositions) {
    throw fail(
      'TP_FLAG_VALUE',
      '--max-model-len',
      `at most ${config.maxPositions}, the model's own`,
      `${flag}`,
    );
  }
  return { tokens: flag, limit: 'of --max-model-len' };
}

function encoder(chat: boolean, { source, config }: NamedModel): (text: string, where: string) => number[] {
  let tokenizer: Tokenizer | undefined;
  let template: ChatTemplate | undefined;
  return (text, where) => {
    if (text === '') throw fail('TP_PROMPT_EMPTY', where);
    if (source.kind !== 'checkpoint') throw fail('TP_TOKENIZER_MISSING', source.file);
    tokenizer ??= requireTokenizer(source.dir, config.bosTokenId);
    if (!chat) return tokenizer.encodePrompt(text);
    template ??= loadChatTemplate(source.dir);
    const turn = { addGenerationPrompt: true, enableThinking: false };
    return tokenizer.encode(template.render([{ role: 'user', content: text }], turn));
  };
}

/** "2,17,5"; what is no whole number stays text, for the message. */
function splitIds(text: string): (number | string)[] {
  if (text.trim() === '') return [];
  return text.split(',').map((part) => wholeNumber(part.trim(), 0, Number.MAX_SAFE_INTEGER) ?? part);
}

function requireIds(ids: readonly (number | string)[], where: string, vocab: number): number[] {
  return ids.map((id) => {
    if (typeof id === 'string') throw fail('TP_PROMPT_TOKEN', JSON.stringify(id), where, vocab);
    if (!Number.isInteger(id) || id < 0 || id >= vocab) throw fail('TP_PROMPT_TOKEN', id, where, vocab);
    return id;
  });
}

function readFile(path: string): Draft[] {
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (error) {
    throw fail('TP_FILE_UNREADABLE', path, (error as Error).message);
  }
  const drafts = text.split('\n').flatMap((line, i) => {
    if (line.trim() === '') return [];
    const where = `${path} line ${i + 1}`;
    const row = Row.safeParse(parse(line, path, i + 1));
    if (!row.success) {
      throw fail('TP_PROMPT_FILE', path, `line ${i + 1} holds neither or both of prompt and prompt_ids`);
    }
    const { prompt, prompt_ids } = row.data;
    return [{ where, said: prompt === undefined ? { ids: prompt_ids! } : { text: prompt } }];
  });
  if (drafts.length === 0) throw fail('TP_PROMPT_FILE', path, 'it holds no prompt');
  return drafts;
}

function parse(line: string, path: string, number: number): unknown {
  try {
    return JSON.parse(line);
  } catch (error) {
    throw fail('TP_PROMPT_FILE', path, `line ${number}: ${(error as Error).message}`);
  }
}

/** The model's presets, else a few ids that every vocabulary has. */
function defaults({ presets, config }: NamedModel): Draft[] {
  const ids = presets['prompt-ids'] ?? [
    [config.bosTokenId, 3, 5, 7, 11, 13].filter((id) => id < config.vocabSize),
  ];
  return ids.map((list, i) => ({ where: `default prompt ${i + 1}`, said: { ids: list } }));
}

/** Length of the longest prompt. Any number of prompts: they do not fit into the arguments of one call. */
export function longestOf(prompts: readonly (readonly number[])[]): number {
  return prompts.reduce((longest, { length }) => Math.max(longest, length), 0);
}
