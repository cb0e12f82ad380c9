// Splits a command line into flags and words, and writes the help; what a value means is flag.ts's business.

import yargs from 'yargs';
import { fail } from '../errors.js';
import type { Flag } from './flag.js';

interface Split {
  /** Texts, lists of them or booleans, by the flag's name. */
  given: Record<string, unknown>;
  words: string[];
  /** The help lines if they were asked for. */
  help: string | null;
}

/** Splits `argv`, the words after the command; `epilogue` ends the help. Throws TP_FLAG_UNKNOWN or TP_FLAG_VALUE. */
export function splitWords(
  argv: readonly string[],
  command: string,
  about: { describe: string; word?: string },
  epilogue: string,
  flags: ReadonlyMap<string, Flag<unknown>>,
): Split {
  const parser = yargs(joinValues(argv, flags))
    .locale('en')
    .usage(`tp-run ${command}${about.word ? ` ${about.word}` : ''} [flags]: ${about.describe}`)
    .epilogue(epilogue)
    .help(false)
    .version(false)
    .exitProcess(false)
    .fail(false)
    .strictOptions()
    .parserConfiguration({
      'boolean-negation': false,
      'camel-case-expansion': false,
      'dot-notation': false,
      'parse-numbers': false,
      'parse-positional-numbers': false,
      'short-option-groups': false,
    })
    .wrap(110);
  for (const [name, flag] of flags) {
    parser.option(name, {
      group: `${flag.group}:`,
      describe: flag.describe,
      ...(flag.kind === 'switch' ? { type: 'boolean' } : { type: 'string', requiresArg: true }),
      ...(flag.kind === 'value' ? { defaultDescription: flag.shown ?? String(flag.fallback) } : {}),
    });
  }
  parser.option('help', { type: 'boolean', describe: 'these lines' });
  parser.option('version', { type: 'boolean', describe: 'the version' });

  let parsed: Record<string, unknown>;
  try {
    parsed = parser.parseSync();
  } catch (error) {
    throw refusal(error as Error, command, flags);
  }
  const { _: rest, $0: _program, ...given } = parsed;
  const words = (rest as unknown[]).map(String);
  let help: string | null = null;
  if (given.help) parser.showHelp((lines) => (help = lines));
  else if (!given.version) requireWord(words, command, about.word);
  return { given, words, help };
}

/** `--flag value` as `--flag=value`, so that a value may start with a dash; yargs would read --json=maybe as false. */
function joinValues(argv: readonly string[], flags: ReadonlyMap<string, Flag<unknown>>): string[] {
  const joined: string[] = [];
  for (let i = 0; i < argv.length; i++) {
    const word = argv[i]!;
    const equals = word.indexOf('=');
    const flag = flags.get(word.slice(2, equals < 0 ? undefined : equals));
    if (flag?.kind === 'switch' && equals > 0 && flag.read(word.slice(equals + 1)) === undefined) {
      throw fail(
        'TP_FLAG_VALUE',
        word.slice(0, equals),
        flag.expected,
        JSON.stringify(word.slice(equals + 1)),
      );
    }
    const takesNext = word.startsWith('--') && equals < 0 && flag && flag.kind !== 'switch';
    joined.push(takesNext && i + 1 < argv.length ? `${word}=${argv[++i]}` : word);
  }
  return joined;
}

/** yargs' complaints in our words. */
function refusal(error: Error, command: string, flags: ReadonlyMap<string, Flag<unknown>>): Error {
  const [, missing] = /^Not enough arguments following: (.+)$/.exec(error.message) ?? [];
  if (missing) return fail('TP_FLAG_VALUE', `--${missing}`, flags.get(missing)!.expected, 'nothing');
  const [, unknown] = /^Unknown arguments?: ([^,]+)/.exec(error.message) ?? [];
  return fail('TP_FLAG_UNKNOWN', unknown ? `--${unknown}` : error.message, command);
}

function requireWord(words: readonly string[], command: string, wanted: string | undefined): void {
  const [extra] = words.slice(wanted ? 1 : 0);
  if (extra !== undefined) throw fail('TP_FLAG_UNKNOWN', JSON.stringify(extra), command);
  if (wanted && words.length === 0) {
    throw fail('TP_FLAG_VALUE', `"tp-run ${command}"`, wanted, 'nothing');
  }
}
