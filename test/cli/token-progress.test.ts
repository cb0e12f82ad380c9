import { describe, expect, it } from 'vitest';
import { TokenProgress } from '../../src/cli/token-progress.js';

const row = (sequence: number, finish: 'length' | 'stop' | null = null) => ({
  sequence,
  position: 0,
  token: 1,
  logprob: 0,
  targetLogprob: null,
  finish,
});

describe('the progress of decoding', () => {
  it('counts tokens of all sequences and their rate since the first', () => {
    const progress = new TokenProgress(2, 10);
    expect(progress.text(0)).toBe('0 of 20 tokens');
    progress.add({ rows: [row(0), row(1)] }, 1000);
    expect(progress.text(1000)).toBe('2 of 20 tokens');
    progress.add({ rows: [row(0), row(1)] }, 1500);
    expect(progress.text(2000)).toBe('4 of 20 tokens, 2.00 tokens/s');
  });

  it('no longer waits for what a stopped sequence will not say', () => {
    const progress = new TokenProgress(2, 10);
    progress.add({ rows: [row(0), row(1)] }, 0);
    progress.add({ rows: [row(0, 'stop'), row(1)] }, 1000);
    expect(progress.text(1000)).toBe('4 of 12 tokens, 2.00 tokens/s');
  });
});
