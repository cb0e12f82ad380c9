// stdout: results alone. A reader that leaves early (`tp-run | head`) ends the run without a fuss.

import { fstatSync, writeFileSync } from 'node:fs';
import { fail } from '../errors.js';
import type { Options } from './options.js';

/** Thrown by `print` when nobody reads stdout any more. */
export class ReaderGone extends Error {}

let readerGone = false;

/** Device number of /dev/tty, which stands for whatever terminal the process has. */
const DEV_TTY = (5 << 8) | 0;

process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') throw error;
  readerGone = true;
});

/** Writes a piece of the result. */
export function print(text: string): void {
  if (readerGone) throw new ReaderGone();
  process.stdout.write(text);
}

/** What goes to stdout and what goes to stderr meet on one terminal. */
export function sharesTerminal(): boolean {
  if (!process.stdout.isTTY || !process.stderr.isTTY) return false;
  const [out, err] = [process.stdout.fd, process.stderr.fd].map((fd) => fstatSync(fd).rdev);
  return out === err || out === DEV_TTY || err === DEV_TTY;
}

/** One JSON object; numbers that JSON lacks (NaN, infinities) become null. */
export function printJson(value: unknown): void {
  print(`${JSON.stringify(value)}\n`);
}

/** `--out` and `--trace`: refuses a place that cannot be written before the work begins. TP_FILE_UNWRITABLE. */
export function requireOut({ out, trace }: Pick<Options, 'out' | 'trace'>): void {
  for (const path of [out, trace]) if (path !== null) writeOut(path, '', 'a');
}

/** Writes the result to `--out`, if there is one. TP_FILE_UNWRITABLE. */
export function writeResult({ out }: Pick<Options, 'out'>, value: unknown): void {
  if (out !== null) writeOut(out, `${JSON.stringify(value, null, 1)}\n`);
}

/** TP_FILE_UNWRITABLE. */
export function writeOut(path: string, text: string, flag: 'a' | 'w' = 'w'): void {
  try {
    writeFileSync(path, text, { flag });
  } catch (error) {
    throw fail('TP_FILE_UNWRITABLE', path, (error as Error).message);
  }
}
