// `tp-run [generate]`: decodes prompts and shows the tokens as they come.

import type { Sampling } from '../engine/job.js';
import { candidatesFor } from '../engine/sampler.js';
import { EXIT } from '../errors.js';
import { log } from '../log.js';
import { leavesOf } from '../model/shard.js';
import { loadTokenizer } from '../model/tokenizer.js';
import type { GenerateResult, RunFacts } from '../report/schema.js';
import { counted, percent, short } from '../report/table.js';
import { chooseDevice } from './device.js';
import { requireRoom, writeLogits } from './dump.js';
import { openModel } from './model.js';
import { type Options, ranksOf } from './options.js';
import { printJson, sharesTerminal } from './output.js';
import { longestOf, readPrompts } from './prompts.js';
import { Recorder } from './recorder.js';
import { withRun } from './session.js';
import { runSpec } from './spec.js';
import { TokenPrinter } from './token-printer.js';
import { TokenProgress } from './token-progress.js';

export async function generate(options: Options): Promise<number> {
  const { maxTokens } = options;
  const model = openModel(options.model, options.seed);
  const { config, source } = model;
  const prompts = readPrompts(options, model, maxTokens);
  const tokenizer = source.kind === 'checkpoint' ? loadTokenizer(source.dir, config.bosTokenId) : null;
  const chosen = chooseDevice(options);
  const sampling = samplingOf(options);
  const spec = runSpec(options, model, chosen, {
    ranks: ranksOf(options),
    sequences: Math.min(options.batch, prompts.length),
    positions: longestOf(prompts.map(({ ids }) => ids)) + maxTokens,
    everyRow: false,
    candidates: candidatesFor(sampling, config.vocabSize / leavesOf(config)),
    trace: false,
  });
  if (options.dumpLogits !== null) {
    requireRoom(options.dumpLogits, prompts.length * maxTokens * config.vocabSize);
  }
  if (chosen.line) log.info(chosen.line);

  const recorder = new Recorder(prompts.length);
  const printer = options.json ? null : new TokenPrinter(prompts.length, tokenizer);
  // tokens that stream over the same terminal show by themselves how far decoding is
  const progress = printer && sharesTerminal() ? null : new TokenProgress(prompts.length, maxTokens);
  const facts = await withRun(options, spec, async ({ run, facts }) => {
    const job = {
      kind: 'generate' as const,
      sequences: prompts.map(({ ids }, sequence) => ({ promptIds: ids, maxTokens, sequence })),
      sampling,
      stopTokenIds: options.ignoreEos ? [] : config.eosTokenIds,
      keepLogits: options.dumpLogits !== null,
      fault: null,
    };
    await run.execute(job, (step) => {
      recorder.add(step);
      progress?.add(step);
      for (const { sequence, token, finish } of step.rows) printer?.push(sequence, token, finish !== null);
    });
    progress?.end();
    return facts;
  });

  const { records } = recorder;
  if (options.dumpLogits !== null)
    writeLogits(
      options.dumpLogits,
      records.map(({ logits }) => logits),
    );
  if (options.json) {
    const result: GenerateResult = {
      schema: 'tp-run/generate/1',
      results: records.map((record, i) => ({
        prompt_ids: prompts[i]!.ids,
        token_ids: record.tokenIds,
        text: tokenizer?.decode(record.tokenIds, true) ?? null,
        logprobs: record.logprobs,
        finish_reason: record.finish ?? 'length',
      })),
      timing: {
        load_s: facts.load_s,
        prefill_ms: recorder.prefillMs,
        tpot_ms: recorder.tpot,
        shares_ms: recorder.shares,
      },
      run: facts,
    };
    printJson(result);
  } else {
    summarize(recorder, facts);
  }
  return EXIT.ok;
}

function samplingOf({ temperature, topK, topP, seed }: Options): Sampling {
  return { temperature, topK, topP, seed: seed ?? 0 };
}

function summarize(recorder: Recorder, facts: RunFacts): void {
  const { tokens, records, prefillMs, tpot, shares } = recorder;
  const prompts = records.length === 1 ? '' : ` for ${records.length} prompts`;
  const gb = facts.weight_bytes.reduce((sum, bytes) => sum + bytes, 0) / 1e9;
  const rate = (1000 * gb) / (facts.stage_ms.weights ?? Number.NaN);
  const weights = `weights ${short(gb)} GB at ${short(rate)} GB/s`;
  const load = `load ${short(facts.load_s ?? Number.NaN)} s (${weights}), prompt ${short(prefillMs)} ms`;
  log.info(
    `${counted(tokens, 'token')}${prompts}: ${load}, TPOT median ${short(tpot.median)} ms, p90 ${short(tpot.p90)} ms`,
  );
  if (shares) {
    const sum = shares.compute + shares.sync + shares.host;
    const part = (name: keyof typeof shares) =>
      `${name} ${short(shares[name])} ms (${percent(shares[name] / sum)})`;
    log.info(`per token: ${part('compute')}, ${part('sync')}, ${part('host')}`);
  }
  log.info(`tp=${facts.tp} ${facts.device} ${facts.dtype}, collective ${facts.collective_why}`);
}
