// `tp-run score`: the log-probability of every token of given prompts, teacher-forced.

import { EXIT } from '../errors.js';
import { log } from '../log.js';
import type { ScoreResult } from '../report/schema.js';
import { short, table } from '../report/table.js';
import { chooseDevice } from './device.js';
import { requireRoom, writeLogits } from './dump.js';
import { openModel } from './model.js';
import { type Options, ranksOf } from './options.js';
import { print, printJson } from './output.js';
import { longestOf, readPrompts } from './prompts.js';
import { Recorder } from './recorder.js';
import { withRun } from './session.js';
import { runSpec } from './spec.js';

export async function score(options: Options): Promise<number> {
  const model = openModel(options.model, options.seed);
  const prompts = readPrompts(options, model, 0);
  const lengths = prompts.map(({ ids }) => ids.length);
  const chosen = chooseDevice(options);
  const spec = runSpec(options, model, chosen, {
    ranks: ranksOf(options),
    sequences: Math.min(options.batch, prompts.length),
    positions: longestOf(prompts.map(({ ids }) => ids)),
    everyRow: true,
    candidates: 1,
    trace: false,
  });
  if (options.dumpLogits !== null) {
    requireRoom(options.dumpLogits, lengths.reduce((sum, n) => sum + n, 0) * model.config.vocabSize);
  }
  if (chosen.line) log.info(chosen.line);

  const recorder = new Recorder(prompts.length);
  const facts = await withRun(options, spec, async ({ run, facts }) => {
    const job = {
      kind: 'score' as const,
      sequences: prompts.map(({ ids }, sequence) => ({ promptIds: ids, maxTokens: 0, sequence })),
      keepLogits: options.dumpLogits !== null,
      fault: null,
    };
    await run.execute(job, (step) => recorder.add(step));
    return facts;
  });

  const { records, prefillMs } = recorder;
  if (options.dumpLogits !== null)
    writeLogits(
      options.dumpLogits,
      records.map(({ logits }) => logits),
    );
  const result: ScoreResult = {
    schema: 'tp-run/score/1',
    results: records.map(({ targetLogprobs }, i) => ({
      prompt_ids: prompts[i]!.ids,
      // The row of a token tells of the one behind it.
      token_logprobs: [null, ...targetLogprobs.slice(0, -1)],
    })),
    timing: { load_s: facts.load_s, prefill_ms: prefillMs },
    run: facts,
  };
  if (options.json) printJson(result);
  else print(scoreTable(result));
  return EXIT.ok;
}

function scoreTable({ results }: ScoreResult): string {
  const rows = results.map(({ token_logprobs }, i) => {
    const known = token_logprobs.filter((logprob) => logprob !== null);
    const sum = known.reduce((total, logprob) => total + logprob, 0);
    return [`${i}`, `${token_logprobs.length}`, sum.toFixed(4), short(Math.exp(-sum / known.length))];
  });
  return table(['prompt', 'tokens', 'log-probability', 'perplexity'], rows);
}
