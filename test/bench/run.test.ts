// The script that measures a GPU host, here on the CPU with the tiny model: every part of it that needs no GPU.

import { execFile } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { describe, expect, it } from 'vitest';
import { root } from '../helpers/fixture.js';
import { tempDir } from '../helpers/tempdir.js';

const script = (name: string) => import(pathToFileURL(join(root, 'test', name)).href);
const { Gpus } = await script('gpu/gpus.mjs');
const { markdown } = await script('bench/markdown.mjs');

/** Runs the script; its exit code and the JSON and the page that it leaves. */
async function bench(...words: string[]) {
  const out = tempDir();
  const shape = ['--batch-sizes', '1,2', '--contexts', '8,80', '--steps', '4', '--out', out];
  const command = [join(root, 'test/bench/run.mjs'), '--device', 'cpu', ...shape, ...words];
  const code = await new Promise((resolve) => {
    execFile(process.execPath, command, (error) => resolve(error?.code ?? 0));
  });
  const [traces, left] = [true, false].map((traced) =>
    readdirSync(out).filter((name) => name.endsWith('.trace.json') === traced),
  ) as [string[], string[]];
  const read = (end: string) => readFileSync(join(out, left.find((name) => name.endsWith(end))!), 'utf8');
  return { code, traces, page: read('.md'), result: JSON.parse(read('.json')) };
}

describe('the bench script', () => {
  it('measures decoding, stages, contexts and a death, and says what was left out', async () => {
    const only = 'decode tp=2,stages tp=2,context tp=2,kill';
    const { code, traces, page, result } = await bench('--model', 'configs/tiny.json', '--only', only);
    expect(result.failed).toEqual([]);
    expect(code).toBe(0);
    expect(result.schema).toBe('tp-run/bench/2');
    expect(result.provenance.node).toBe(process.version);
    expect(result.decode[0].rows.map((row: { batch: number }) => row.batch)).toEqual([1, 2]);
    expect(result.stages[0].rows[0].stages.steps).toBe(4);
    expect(result.context[0].rows.map((row: { context: number }) => row.context)).toEqual([8, 80]);
    expect(result.load).toMatchObject([{ tp: 2, what: 'synthetic' }]);
    expect(result.kill).toMatchObject([{ ranks: 2, victim: 1 }]);
    expect(result.left_out).toEqual([
      'decode tp=1',
      'stages tp=1',
      'context tp=1',
      'allreduce zmq',
      'check tp=2',
    ]);
    expect(traces).toHaveLength(1);
    for (const heading of [
      'Time per output token',
      'Over context',
      'Where a step goes',
      'The experts within a step',
      'A rank that dies',
      'Left out',
    ])
      expect(page).toContain(`## ${heading}`);
    expect(page).toMatch(/^\| before, behind and unexplained \|/m);
    const [, experts] = page.split('## The experts within a step');
    const [, batches] = [...experts!.matchAll(/^\| 2 \| (\d) \| [\d.]+ \| [\d.]+ \|/gm)].map(
      ([, batch]) => batch,
    );
    expect(batches).toBe('2');
  });

  it('names what failed, in the page and in its exit code', async () => {
    const { code, page, result } = await bench('--model', 'configs/none.json', '--only', 'decode tp=1');
    expect(code).toBe(1);
    expect(result.failed).toMatchObject([
      { name: 'decode tp=1', error: expect.stringContaining('TP_FILE_UNREADABLE') },
    ]);
    expect(page).toMatch(/^- decode tp=1: tp-run bench decode/m);
  });
});

describe('--gpus', () => {
  it('of a number measures 1, 2, 4 and 8 ranks as far as it goes', () => {
    const eight = new Gpus('8');
    expect(eight.degrees.map((ranks: number) => eight.flag(ranks))).toEqual(['1', '2', '4', '8']);
    expect([eight.cards, eight.collectives]).toEqual([8, ['peer', 'nccl']]);
    expect(new Gpus('2').degrees).toEqual([1, 2]);
  });

  it('of devices spreads fewer ranks over them, and leaves NCCL alone where ranks share a card', () => {
    const shared = new Gpus('0,0,1,1');
    expect(shared.degrees.map((ranks: number) => shared.flag(ranks))).toEqual(['1', '0,1', '0,0,1,1']);
    expect([shared.count, shared.cards, shared.collectives]).toEqual([4, 2, ['peer']]);
    expect(new Gpus('2,3').collectives).toEqual(['peer', 'nccl']);
  });

  it('of anything else is refused', () => {
    expect(() => new Gpus('two')).toThrow('--gpus two');
  });
});

describe('the page', () => {
  /** A bench of the 26B shape at batch 1, whose ranks read 7.65 GB a step together. */
  const bench = (tp: number) => ({
    run: {
      tp,
      device: 'cuda',
      dtype: 'bfloat16',
      model: 'configs/gemma-4-26b-a4b.json',
      collective_why: 'peer',
    },
    read_bandwidth_gb_per_s: 4550 * tp,
    rows: [
      {
        ...{ batch: 1, context: 32, steps: 200, read_gb: 7.65, gb_per_s: 3000, share_of_bandwidth: 0.5 },
        tpot_ms: { median: 2, p10: 2, p90: 2 },
        stages: { step_us: 2000, sync_us: 300, rows: [], stages_us: 0, gaps_us: 0, outside_us: 0 },
      },
    ],
  });
  const empty = {
    context: [],
    moe: [],
    allreduce: [],
    load: [],
    checks: [],
    kill: [],
    failed: [],
    left_out: [],
  };

  it('lays every number of GPUs beside its floor, what was published, and the share of sums', () => {
    const decode = [8, 4, 2, 1].map(bench);
    const provenance = {
      cpu: 'x',
      cores: 1,
      os: 'linux',
      node: 'v20',
      cuda: '13.0',
      commit: 'abc',
      dirty: false,
    };
    const result = {
      started: '2026-11-22',
      command: [],
      provenance,
      gpus: null,
      decode,
      stages: [bench(2)],
      ...empty,
    };
    const rows = markdown(result, 'raw.json')
      .match(/^\| \d.*$/gm)!
      .map((line: string) => line.split(' | '));
    expect(rows.map((cells: string[]) => [cells[0], cells[5]])).toEqual([
      ['| 1', '1.68'],
      ['| 2', '0.84'],
      ['| 4', '0.42'],
      ['| 8', '0.21'],
    ]);
    expect(rows[1].slice(9)).toEqual(['15 %', '2.82 |']);
    expect(rows[2].slice(9)).toEqual(['', ' |']);
  });

  it('details the stages of the first batch size and of 8, whichever were timed', () => {
    const { rows, ...others } = bench(2);
    const timed = { ...others, rows: [2, 4, 8].map((batch) => ({ ...rows[0]!, batch })) };
    const provenance = { cpu: 'x', cores: 1, os: 'linux', node: 'v20', cuda: '13.0', commit: 'abc' };
    const result = { started: '2026-11-22', command: [], provenance, gpus: null, decode: [], ...empty };
    const headings = markdown({ ...result, stages: [timed] }, 'raw.json').match(/^### .*$/gm);
    expect(headings).toEqual(['### TP=2, batch 2, context 32', '### TP=2, batch 8, context 32']);
  });
});
