import { expect, it } from 'vitest';
import { longestOf } from '../../src/cli/prompts.js';

it('finds the longest of very many prompts', () => {
  const prompts = Array.from({ length: 300_000 }, (_, i) => [2, ...(i === 299_999 ? [3, 4] : [])]);
  expect(longestOf(prompts)).toBe(3);
  expect(longestOf([])).toBe(0);
});
