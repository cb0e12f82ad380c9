import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type ChatMessage, loadChatTemplate } from '../../src/model/chat.js';
import { loadTokenizer, requireTokenizer, TextStream } from '../../src/model/tokenizer.js';

const dir = join(import.meta.dirname, '..', 'fixtures', 'tiny-moe-hub');
const withoutTokenizer = join(import.meta.dirname, '..', 'fixtures', 'tiny-moe');
const json = <T>(name: string): T => JSON.parse(readFileSync(join(dir, name), 'utf8'));
const tokenizer = requireTokenizer(dir, 2);

const samples = json<{ text: string; ids: number[]; decoded: string }[]>('tokenizer_samples.json');
const chats =
  json<{ messages: ChatMessage[]; enable_thinking: boolean; text: string; ids: number[] }[]>(
    'chat_samples.json',
  );

describe('the tokenizer', () => {
  it.each(samples)('encodes and decodes $text like the reference', ({ text, ids, decoded }) => {
    expect(tokenizer.encode(text)).toEqual(ids);
    expect(tokenizer.decode(ids, false)).toBe(decoded);
  });

  it('puts BOS in front of a raw prompt exactly once', () => {
    expect(tokenizer.encodePrompt('Hello world!')).toEqual([2, 486, 446, 296, 288, 265]);
    expect(tokenizer.encodePrompt('<bos>Hello world!')).toEqual([2, 486, 446, 296, 288, 265]);
  });

  it('is asked for by name when a folder has none', () => {
    expect(loadTokenizer(withoutTokenizer, 2)).toBeNull();
    expect(() => requireTokenizer(withoutTokenizer, 2)).toThrow(
      expect.objectContaining({ code: 'TP_TOKENIZER_MISSING', exitCode: 2 }),
    );
  });
});

describe('streamed text', () => {
  const pieces = (ids: number[], skipSpecial: boolean) => {
    const stream = new TextStream(tokenizer, skipSpecial);
    return [...ids.map((id) => stream.push(id)), stream.end()];
  };

  it('holds back a character until its last byte is there', () => {
    const ids = tokenizer.encode('a🙂b');
    const out = pieces(ids, false);
    expect(out.join('')).toBe('a🙂b');
    expect(out.filter((piece) => piece !== '')).toEqual(['a', '🙂', 'b']);
    expect(out.length).toBeGreaterThan(5); // the face takes four byte tokens
  });

  it('shows bytes that never became a character at the end', () => {
    const ids = tokenizer.encode('a🙂').slice(0, -1);
    expect(pieces(ids, false).at(-1)).toBe('\ufffd');
  });

  it('leaves special tokens out when asked', () => {
    expect(pieces(tokenizer.encode('<bos>The<turn|>'), true).join('')).toBe('The');
  });

  it.each([true, false])(
    'is the text of all ids, whatever they are (special left out: %s)',
    (skipSpecial) => {
      const ids = fc.array(fc.integer({ min: 0, max: 511 }), { minLength: 1, maxLength: 40 });
      fc.assert(
        fc.property(ids, (list) => {
          expect(pieces(list, skipSpecial).join('')).toBe(tokenizer.decode(list, skipSpecial));
        }),
      );
    },
  );
});

describe('the chat template', () => {
  const template = loadChatTemplate(dir);

  it.each(chats)('lays out sample %# like the reference', ({ messages, enable_thinking, text, ids }) => {
    const rendered = template.render(messages, {
      addGenerationPrompt: true,
      enableThinking: enable_thinking,
    });
    expect(rendered).toBe(text);
    expect(tokenizer.encode(rendered)).toEqual(ids);
  });

  it('leaves the model turn closed when no generation prompt is asked for', () => {
    const [{ messages }] = chats as [(typeof chats)[0]];
    const options = { addGenerationPrompt: false, enableThinking: false };
    expect(template.render(messages, options)).toBe('<bos><|turn>user\nHello world!<turn|>\n');
  });

  it('is asked for by name when a folder has none', () => {
    expect(() => loadChatTemplate(withoutTokenizer)).toThrow(
      expect.objectContaining({ code: 'TP_CHAT_TEMPLATE_MISSING', exitCode: 2 }),
    );
  });

  it('that fails is an error with its reason', () => {
    expect(() => template.render([], { addGenerationPrompt: true, enableThinking: false })).toThrow(
      expect.objectContaining({ code: 'TP_CHAT_TEMPLATE', exitCode: 2 }),
    );
  });
});
