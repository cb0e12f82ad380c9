import { afterEach, describe, expect, it, vi } from 'vitest';
import { Log, sparingly } from '../src/log.js';

function record(isTTY: boolean) {
  const out = { text: '', isTTY, write: (text: string) => (out.text += text) };
  return { out, log: new Log(out) };
}

describe('the log', () => {
  it('marks errors and warnings, and drops what is below its level', () => {
    const { out, log } = record(false);
    log.error('a');
    log.warn('b');
    log.info('c');
    log.debug('d');
    expect(out.text).toBe('error: a\nwarn: b\nc\n');
  });

  it('puts the prefix before its own lines and another before forwarded ones', () => {
    const { out, log } = record(false);
    log.prefix = 'host:0 ';
    log.info('own');
    log.forward(['one', 'two'], 'host:1 ');
    log.forward([], 'host:2 ');
    expect(out.text).toBe('host:0 own\nhost:1 one\nhost:1 two\n');
  });

  it('shows progress on a terminal alone', () => {
    const { out, log } = record(false);
    log.progress('half');
    expect(out.text).toBe('');
  });

  it('writes lines above the progress, which stays the last line until it is taken away', () => {
    const { out, log } = record(true);
    log.progress('half');
    log.info('news');
    log.progress('half');
    log.progress('');
    log.info('end');
    const clear = '\r\x1b[K';
    expect(out.text).toBe(`${clear}half${clear}news\nhalf${clear}end\n`);
  });
});

describe('what is said sparingly', () => {
  afterEach(() => void vi.useRealTimers());

  it('is a few lines a second, and how many were left out', () => {
    vi.useFakeTimers({ toFake: ['performance'] });
    const said: string[] = [];
    const say = sparingly((text) => said.push(text), 2);
    for (const text of ['a', 'b', 'c', 'd']) say(text);
    vi.advanceTimersByTime(1000);
    for (const text of ['e', 'f', 'g']) say(text);
    vi.advanceTimersByTime(5000);
    say('h');
    expect(said).toEqual(['a', 'b', 'e, and 2 more before it', 'f', 'h, and 1 more before it']);
  });
});
