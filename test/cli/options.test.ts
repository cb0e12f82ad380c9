import { availableParallelism } from 'node:os';
import { describe, expect, it } from 'vitest';
import {
  COMMANDS,
  type Command,
  defaultThreads,
  type Options,
  readCommandLine,
} from '../../src/cli/options.js';
import { TpError } from '../../src/errors.js';
import { fixture } from '../helpers/fixture.js';

/** A model without presets. */
const plain = `--model ${fixture('tiny-moe')}`;

function options(line: string, env: Record<string, string> = {}): Options {
  const read = readCommandLine(line.split(' ').filter(Boolean), env);
  if (read.kind !== 'run') throw new Error(`"${line}" is ${read.kind}`);
  return read.options;
}

function refusal(argv: string[], env: Record<string, string> = {}): TpError {
  try {
    readCommandLine(argv, env);
  } catch (error) {
    if (error instanceof TpError) return error;
    throw error;
  }
  throw new Error(`${argv.join(' ')} was accepted`);
}

describe('the command line', () => {
  it('generates when no command is named', () => {
    expect(readCommandLine(['--gpus', '2'], {})).toMatchObject({
      command: 'generate',
      options: { gpus: { count: 2 } },
    });
  });

  it('takes a list of devices as one rank each', () => {
    expect(options('--gpus 0,3').gpus).toEqual({ count: 2, devices: [0, 3] });
    expect(options('--gpus 0,0,1,1').gpus).toEqual({ count: 4, devices: [0, 0, 1, 1] }); // ranks may share one
    expect(options('--gpus 2').gpus).toEqual({ count: 2, devices: null });
  });

  it('lets a flag win over its variable and the variable over the default', () => {
    expect(options(plain, {}).maxTokens).toBe(64);
    expect(options(plain, { TP_RUN_MAX_TOKENS: '7' }).maxTokens).toBe(7);
    expect(options(`${plain} --max-tokens 9`, { TP_RUN_MAX_TOKENS: '7' }).maxTokens).toBe(9);
    expect(options('', { TP_RUN_JSON: 'true', TP_RUN_PROMPT_IDS: '2,5' })).toMatchObject({
      json: true,
      promptIds: ['2,5'],
    });
  });

  it('takes what the model presets where neither flag nor variable says otherwise', () => {
    expect(options('').maxTokens).toBe(32);
    expect(options('', { TP_RUN_MAX_TOKENS: '7' }).maxTokens).toBe(7);
    expect(options('--max-tokens 9').maxTokens).toBe(9);
    expect(options('').promptIds).toEqual([]);
  });

  it('ignores the variable of a flag that the command does not know', () => {
    expect(options('doctor', { TP_RUN_MAX_TOKENS: '7' }).maxTokens).toBe(64);
  });

  it('keeps the order of repeated prompts and lets a text start with a dash', () => {
    const read = readCommandLine(['--prompt', '-hello', '--prompt=two words', '--prompt', 'a=b'], {});
    expect(read).toMatchObject({ options: { prompt: ['-hello', 'two words', 'a=b'] } });
  });

  it('freezes what it hands out', () => {
    expect(Object.isFrozen(options(''))).toBe(true);
  });

  it('shares the cores among the ranks', () => {
    expect(defaultThreads(1)).toBe(availableParallelism());
    expect(defaultThreads(10_000)).toBe(1);
  });

  it.each([
    [['--gpu', '2'], 'TP_FLAG_UNKNOWN', '--gpu means nothing to "tp-run generate"'],
    [['-x'], 'TP_FLAG_UNKNOWN', 'x'],
    [['score', '--max-tokens', '3'], 'TP_FLAG_UNKNOWN', '--max-tokens'],
    [['generate', 'hello'], 'TP_FLAG_UNKNOWN', '"hello"'],
    [['serve'], 'TP_COMMAND', 'serve'],
    [['constructor'], 'TP_COMMAND', 'constructor'],
    [['--gpus'], 'TP_FLAG_VALUE', 'but received nothing'],
    [['--gpus', '0'], 'TP_FLAG_VALUE', '"0"'],
    [['--gpus', '1,x'], 'TP_FLAG_VALUE', '"1,x"'],
    [['--gpus', '2.5'], 'TP_FLAG_VALUE', '"2.5"'],
    [['--gpus', '-2'], 'TP_FLAG_VALUE', '"-2"'],
    [['--gpus', '2', '--gpus', '4'], 'TP_FLAG_VALUE', 'one value'],
    [['--max-tokens', '1e3'], 'TP_FLAG_VALUE', 'a whole number from 1'],
    [['--max-tokens', ''], 'TP_FLAG_VALUE', '""'],
    [['--temperature', 'NaN'], 'TP_FLAG_VALUE', '"NaN"'],
    [['--temperature', '-1'], 'TP_FLAG_VALUE', '"-1"'],
    [['--temperature', '1e999'], 'TP_FLAG_VALUE', '"1e999"'],
    [['--top-p', '0'], 'TP_FLAG_VALUE', 'a number above 0 to 1'],
    [['--dtype', 'float16'], 'TP_FLAG_VALUE', 'bfloat16, float32'],
    [['--json=maybe'], 'TP_FLAG_VALUE', '"maybe"'],
    [['--model', ''], 'TP_FLAG_VALUE', '""'],
    [['check', '--plant-fault', 'layer=x'], 'TP_FLAG_VALUE', 'layer=L,stage=NAME'],
    [['bench'], 'TP_COMMAND', 'bench decode'],
    [['bench', 'decode', 'more'], 'TP_FLAG_UNKNOWN', '"more"'],
    [['bench', 'attention'], 'TP_COMMAND', '"bench attention"'],
    [['export'], 'TP_FLAG_VALUE', 'DIR'],
    [['bench', 'decode', '--batch-size', '1,,2'], 'TP_FLAG_VALUE', '"1,,2"'],
  ] as const)('refuses %j', (argv, code, text) => {
    const error = refusal([...argv]);
    expect(error).toMatchObject({ code, exitCode: 2 });
    expect(error.message).toContain(text);
  });

  it('names the variable that holds a bad value', () => {
    expect(refusal([], { TP_RUN_GPUS: 'two' }).message).toMatch(
      /^TP_FLAG_VALUE: expected .* for TP_RUN_GPUS .*"two"/,
    );
  });

  it('refuses a misspelt variable', () => {
    expect(refusal([], { TP_RUN_GPU: '2' })).toMatchObject({ code: 'TP_VARIABLE_UNKNOWN', exitCode: 2 });
  });

  it.each(Object.keys(COMMANDS) as Command[])(
    'prints every flag of %s with its default in --help',
    (command) => {
      const read = readCommandLine([...command.split(' '), '--help'], {});
      if (read.kind !== 'help') throw new Error(read.kind);
      for (const key of COMMANDS[command].flags) {
        expect(read.text).toContain(`--${key.replace(/[A-Z]/g, (c) => `-${c.toLowerCase()}`)} `);
      }
    },
  );

  it('lists the commands in --help', () => {
    const read = readCommandLine(['--help'], {});
    for (const command of Object.keys(COMMANDS))
      expect(read).toMatchObject({ text: expect.stringContaining(command) });
  });

  it('answers --version without reading anything else', () => {
    expect(readCommandLine(['--version'], { TP_RUN_GPU: '2' })).toEqual({ kind: 'version' });
  });
});
