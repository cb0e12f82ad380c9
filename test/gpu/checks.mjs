// The same bits: `tp-run check` at every number of ranks and by each device collective, and logits laid beside each other
// where two ways of running must not differ. At the tiny size, at the real width, and at the whole 26B model.

import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { good, must, REAL_WIDTH, root } from './harness.mjs';

export const WHOLE_MODEL = join(root, 'configs/gemma-4-26b-a4b.json');
const LIMIT_S = 570;
/** Flags for `count` prompts of `length` tokens, no two alike. */
const promptsOf = (count, length) =>
  Array.from({ length: count }, (_, i) => [
    '--prompt-ids',
    Array.from({ length }, (_, at) => (2 + 7919 * i + 104729 * at) % 262144).join(),
  ]).flat();
/** As many sequences as a step may have whose rows are blind to each other, at the real width. */
const SIXTEEN = ['--batch', '16', ...promptsOf(16, 9)];
/** Fresh runs of the whole model that must repeat the first. */
const REPEATS = 20;

/** `tp-run check`, which must pass; its result, whose `line` is what people read. */
export async function passingCheck(words) {
  const result = await good(['check', ...words, '--json'], { limitS: LIMIT_S });
  must(result.verdict === 'pass', result.line);
  return result;
}

export async function checks(suite, gpus) {
  for (const ranks of gpus.degrees.slice(1)) {
    const on = ['--gpus', gpus.flag(ranks), '--device', 'cuda'];
    for (const collective of gpus.collectives) {
      for (const [name, model] of [
        ['tiny', []],
        ['real width', ['--model', REAL_WIDTH, '--max-tokens', '8']],
        ['real width, 16 sequences', ['--model', REAL_WIDTH, '--max-tokens', '8', ...SIXTEEN]],
      ]) {
        await suite.test(`check: ${ranks} ranks by ${collective}, ${name}`, async () => {
          const { line, run } = await passingCheck([...on, '--collective', collective, ...model]);
          must(run.collective === collective, `it ran on ${run.collective_why}`);
          return line;
        });
      }
    }
    await suite.test(`check 26B: ${ranks} ranks`, async () => {
      const { line } = await passingCheck([
        ...on,
        '--model',
        WHOLE_MODEL,
        '--max-tokens',
        '64',
        ...promptsOf(8, 64),
      ]);
      return line;
    });
    await suite.test(`check 26B: ${ranks} ranks, 16 sequences`, async () => {
      const { line } = await passingCheck([...on, '--model', WHOLE_MODEL, '--max-tokens', '16', ...SIXTEEN]);
      return line;
    });
  }
  await suite.test(`check 26B: ${gpus.count} ranks, ${REPEATS} fresh runs`, async () => {
    const on = ['--gpus', gpus.flag(gpus.count), '--device', 'cuda', '--model', WHOLE_MODEL];
    const words = [...on, '--max-tokens', '16', '--level', 'logits', '--repeats', `${REPEATS}`];
    return (await passingCheck(words)).line;
  });
  await ways(suite, gpus);
}

/** Ways of running the whole model that must give the same bits: prompts of up to 8 tokens, then a decoded stretch. */
async function ways(suite, gpus) {
  const on = ['--gpus', gpus.flag(gpus.count), '--device', 'cuda', '--model', WHOLE_MODEL];
  const prompts = ['--prompt-ids', '2,17,5,99,1234', '--prompt-ids', '2,4,8', '--ignore-eos'];
  const decoded = async (...words) => {
    const folder = mkdtempSync(join(tmpdir(), 'tp-run-gpu-'));
    try {
      const dump = join(folder, 'logits.safetensors');
      const run = ['generate', ...on, ...prompts, ...words, '--json'];
      const stepwise = await good([...run, '--max-tokens', '16', '--dump-logits', dump]);
      const burst = await good([...run, '--max-tokens', '64']);
      return {
        run: burst.run,
        logits: createHash('sha256').update(readFileSync(dump)).digest('hex'),
        tokens: burst.results.map(({ token_ids }) => token_ids.join()).join(';'),
        stepwise: stepwise.results.map(({ token_ids }) => token_ids.join()).join(';'),
      };
    } finally {
      rmSync(folder, { recursive: true });
    }
  };
  let base = null;
  const others = [
    ['--eager'],
    ...(gpus.count > 1 && gpus.collectives.includes('nccl')
      ? [
          ['--collective', 'nccl'],
          ['--collective', 'nccl', '--eager'],
        ]
      : []),
  ];
  await suite.test(`ways 26B: ${gpus.count} ranks, CUDA graphs`, async () => {
    base = await decoded();
    return base.run.collective_why;
  });
  for (const words of others) {
    await suite.test(`ways 26B: ${words.join(' ')} gives the bits of CUDA graphs`, async () => {
      must(base, 'nothing to compare with');
      const other = await decoded(...words);
      must(other.run.eager === words.includes('--eager'), 'it did not run that way');
      for (const what of ['stepwise', 'logits', 'tokens'])
        must(other[what] === base[what], `other ${what}: ${other[what]}, not ${base[what]}`);
      return `logits ${base.logits.slice(0, 12)}`;
    });
  }
}

/** Weights read from a checkpoint are those that the seed makes: both give the same logits, bit for bit. */
export async function checkpoint(suite, gpus) {
  const folder = mkdtempSync(join(tmpdir(), 'tp-run-gpu-'));
  const dir = join(folder, 'model');
  const logitsOf = async (ranks, model) => {
    const dump = join(folder, 'logits.safetensors');
    const words = ['score', '--gpus', gpus.flag(ranks), '--device', 'cuda', '--model', model];
    const prompt = ['--prompt-ids', '2,17,5,99,1234'];
    const { run } = await good([...words, ...prompt, '--dump-logits', dump, '--json']);
    return { run, hash: createHash('sha256').update(readFileSync(dump)).digest('hex') };
  };
  try {
    await suite.test('checkpoint: export of the real width', async () => {
      await good(['export', dir, '--model', REAL_WIDTH], { limitS: 600 });
    });
    for (const ranks of gpus.degrees) {
      await suite.test(`checkpoint: read by ${ranks}, the bits of the synthetic weights`, async () => {
        const made = await logitsOf(ranks, REAL_WIDTH);
        await logitsOf(ranks, dir); // into the page cache
        const { run, hash } = await logitsOf(ranks, dir);
        must(hash === made.hash, `other logits: ${hash}, not ${made.hash}`);
        const rates = run.weight_bytes.map((bytes) => (bytes / 1e6 / run.stage_ms.weights).toFixed(1));
        return `read at ${rates.join(' and ')} GB/s`;
      });
    }
  } finally {
    rmSync(folder, { recursive: true });
  }
}
