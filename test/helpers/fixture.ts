import { readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..');

/** Path of a folder or file in test/fixtures. */
export function fixture(name: string): string {
  return join(root, 'test', 'fixtures', name);
}

/** golden.json of a checkpoint in test/fixtures: prompts and what Hugging Face transformers decoded greedily in fp32. */
export interface Golden {
  prompts: number[][];
  greedy: { tokens: number[]; margin: number[]; logprob: number[] }[];
}

export function golden(name: string): Golden {
  return JSON.parse(readFileSync(fixture(`${name}/golden.json`), 'utf8')) as Golden;
}
