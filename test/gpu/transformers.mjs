// The real width beside Hugging Face transformers: six layers of the 26B model (five sliding, one full) with its whole
// vocabulary, 11.3 GB of synthetic weights as a checkpoint that both read. transformers_logits.py makes their numbers;
// all comparing is done here. Needs python3 with torch and transformers,
// 12 GB of disk and, for their float32, 23 GB of GPU memory.

import { execFile } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { good, must, root } from './harness.mjs';
import { compareExact, compareRounded, verdicts } from './parity.mjs';
import { readSafetensors } from './safetensors.mjs';

const MODEL = join(root, 'configs/gemma-4-26b-a4b-6layers.json');
const PROMPTS = 3;
const TOKENS = 64;
const LIMIT_S = 300;

/** Runs a program to its good end; its stdout. */
async function output(command, ...words) {
  const options = { timeout: LIMIT_S * 1000, maxBuffer: 2 ** 28 };
  const { stdout, stderr } = await promisify(execFile)(command, words, options);
  process.stderr.write(stderr);
  return stdout;
}

export async function transformers(suite) {
  const { config } = JSON.parse(readFileSync(MODEL, 'utf8'));
  const folder = mkdtempSync(join(tmpdir(), 'tp-run-gpu-'));
  try {
    const checkpoint = join(folder, 'model');
    const prompts = randomPrompts(config.vocab_size);
    await suite.test('transformers: export of six layers of the real width', async () => {
      const { seconds } = await good(['export', checkpoint, '--model', MODEL], { limitS: LIMIT_S });
      return `${seconds.toFixed(0)} s`;
    });
    const theirs = join(folder, 'theirs');
    await suite.test('transformers: its float32 and bfloat16 logits', async () => {
      mkdirSync(theirs);
      writeFileSync(join(folder, 'prompts.json'), JSON.stringify(prompts));
      const script = join(root, 'test/gpu/transformers_logits.py');
      const words = [script, checkpoint, join(folder, 'prompts.json'), theirs, 'cuda'];
      return (await output('python3', ...words)).trim();
    });
    await suite.test('transformers: the real width beside tp-run', async () => {
      const [fp32, bf16] = ['fp32', 'bf16'].map((name) =>
        readSafetensors(join(theirs, `${name}.safetensors`)),
      );
      const result = await besideTransformers(checkpoint, prompts, 'cuda', (name) =>
        (name.startsWith('fp32') ? fp32 : bf16)(name),
      );
      const lines = verdicts(result);
      must(result.exact.equal && result.rounded.no_further, lines.join('\n'));
      return { said: lines.join('\n'), data: result };
    });
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/**
 * Runs tp-run on the checkpoint and lays it beside `theirs`, a function from `fp32.<i>.logits`, `fp32.<i>.route_index` and
 * `bf16.<i>.logits` to values.
 */
export async function besideTransformers(checkpoint, prompts, device, theirs) {
  const { vocab_size, top_k_experts } = textConfig(checkpoint);
  const folder = mkdtempSync(join(tmpdir(), 'tp-run-gpu-'));
  try {
    const logits = {};
    for (const dtype of ['float32', 'bfloat16']) {
      const dump = join(folder, `${dtype}.safetensors`);
      const words = [
        ...['score', '--gpus', '1', '--device', device, '--model', checkpoint, '--dtype', dtype],
        ...prompts.flatMap((ids) => ['--prompt-ids', ids.join(',')]),
      ];
      await good([...words, '--dump-logits', dump, '--json'], { limitS: LIMIT_S });
      const read = readSafetensors(dump);
      logits[dtype] = prompts.map((_, i) => read(`prompt.${i}.logits`));
    }
    const script = join(root, 'test/gpu/routes.mjs');
    const routes = JSON.parse(
      await output(process.execPath, script, checkpoint, device, JSON.stringify(prompts)),
    );
    const exact = prompts.map((_, i) => theirs(`fp32.${i}.logits`));
    return {
      prompts: prompts.map((ids) => ids.length),
      exact: compareExact(
        prompts.map((_, i) => ({ logits: logits.float32[i], routes: Int32Array.from(routes[i]) })),
        prompts.map((_, i) => ({ logits: exact[i], routes: theirs(`fp32.${i}.route_index`) })),
        top_k_experts,
      ),
      rounded: compareRounded(
        logits.bfloat16,
        prompts.map((_, i) => theirs(`bf16.${i}.logits`)),
        exact,
        vocab_size,
      ),
    };
  } finally {
    rmSync(folder, { recursive: true });
  }
}

function textConfig(checkpoint) {
  const config = JSON.parse(readFileSync(join(checkpoint, 'config.json'), 'utf8'));
  return config.text_config ?? config;
}

/** The same ids every time. */
function randomPrompts(vocab) {
  let x = 1;
  const next = () => {
    x = (Math.imul(x, 1664525) + 1013904223) >>> 0;
    return Math.floor((x / 2 ** 32) * vocab);
  };
  return Array.from({ length: PROMPTS }, () => Array.from({ length: TOKENS }, next));
}
