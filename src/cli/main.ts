#!/usr/bin/env node
// Words -> a command. Whatever goes wrong ends as one coded message on stderr and an exit code of errors.ts.

import { EXIT, fail, TpError } from '../errors.js';
import type { Command, Invocation, Options } from './options.js';
import { ReaderGone } from './output.js';

/** Each command is loaded when it is asked for: a worker starts without the words of a user. */
const RUN: Record<Command, (options: Options, word: string) => Promise<number>> = {
  generate: async (options) => (await import('./generate.js')).generate(options),
  score: async (options) => (await import('./score.js')).score(options),
  check: async (options) => (await import('./check.js')).check(options),
  'bench decode': async (options) => (await import('./bench-decode.js')).benchDecode(options),
  'bench allreduce': async (options) => (await import('./bench-allreduce.js')).benchAllReduce(options),
  'bench moe': async (options) => (await import('./bench-moe.js')).benchMoe(options),
  doctor: async (options) => (await import('./doctor.js')).doctor(options),
  export: async (options, dir) => (await import('./export.js')).exportModel(options, dir),
  ps: async (options) => (await import('./runs.js')).ps(options),
  kill: async (_, which) => (await import('./runs.js')).killRuns(which),
  keygen: async (_, file) => (await import('./keys.js')).keygen(file),
};

async function main(argv: readonly string[]): Promise<number> {
  if (argv[0] === 'worker') return (await import('./worker.js')).runWorker(argv.slice(1));
  const { readCommandLine } = await import('./options.js');
  const invocation = readCommandLine(argv);
  switch (invocation.kind) {
    case 'help':
      process.stdout.write(`${invocation.text}\n`);
      return EXIT.ok;
    case 'version':
      process.stdout.write(`tp-run ${(await import('../report/provenance.js')).packageVersion()}\n`);
      return EXIT.ok;
    case 'run':
      return run(invocation);
  }
}

/** A command that computes does so over all nodes that were started for it. */
async function run({ command, options, words }: Invocation & { kind: 'run' }): Promise<number> {
  const work = (all: Options) => RUN[command](all, words[0] ?? '');
  if (options.place.source === null) return work(options);
  return (await import('./nodes.js')).withNodes(options, work);
}

/** The message of an error, and the exit code; what was not foreseen shows its stack. */
function explain(error: unknown): number {
  if (error instanceof ReaderGone) return EXIT.ok;
  const known =
    error instanceof TpError
      ? error
      : fail('TP_INTERNAL', error instanceof Error ? (error.stack ?? error.message) : String(error));
  process.stderr.write(`${known.message}\n`);
  return known.exitCode;
}

process.exitCode = await main(process.argv.slice(2)).catch(explain);
