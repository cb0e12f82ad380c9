// Words for people, on stderr: stdout carries results alone. One writer, so that a progress line and log lines
// never overwrite each other.

export const LEVELS = ['error', 'warn', 'info', 'debug'] as const;
export type Level = (typeof LEVELS)[number];

export class Log {
  /** Lines below this level are dropped. */
  level: Level = 'info';
  /** Stands before every line; a worker that nobody forwards says `host:rank ` here. */
  prefix = '';
  #progress = '';
  readonly #out: { write(text: string): unknown; readonly isTTY?: boolean };

  constructor(out: { write(text: string): unknown; readonly isTTY?: boolean } = process.stderr) {
    this.#out = out;
  }

  error(text: string): void {
    this.#line('error', text);
  }
  warn(text: string): void {
    this.#line('warn', text);
  }
  info(text: string): void {
    this.#line('info', text);
  }
  debug(text: string): void {
    this.#line('debug', text);
  }

  /** Writes whole lines as they are (a rank's own output), with `prefix` before each. */
  forward(lines: readonly string[], prefix: string): void {
    if (lines.length) this.#write(lines.map((line) => `${prefix}${line}\n`).join(''));
  }

  /** Shows `text` on the terminal's last line until the next call; '' takes it away. Nothing when stderr is no TTY. */
  progress(text: string): void {
    if (!this.#out.isTTY || text === this.#progress) return;
    this.#progress = text;
    this.#out.write(`\r\x1b[K${text}`);
  }

  #line(level: Level, text: string): void {
    if (LEVELS.indexOf(level) > LEVELS.indexOf(this.level)) return;
    const tag = level === 'error' || level === 'warn' ? `${level}: ` : '';
    this.#write(`${this.prefix}${tag}${text}\n`);
  }

  #write(text: string): void {
    this.#out.write(this.#progress ? `\r\x1b[K${text}${this.#progress}` : text);
  }
}

/** Says at most `most` lines in a second; the next line after those counts what was left out. For words that strangers cause. */
export function sparingly(say: (text: string) => void, most: number): (text: string) => void {
  let since = Number.NEGATIVE_INFINITY;
  let said = 0;
  let missed = 0;
  return (text) => {
    const now = performance.now();
    if (now - since >= 1000) {
      since = now;
      said = 0;
    }
    if (said === most) return void missed++;
    said++;
    say(missed ? `${text}, and ${missed} more before it` : text);
    missed = 0;
  };
}

/** This process's log. */
export const log = new Log();
