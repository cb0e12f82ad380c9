// NCCL's own view of a run: its RAS threads (NCCL 2.24 and newer) answer on a TCP port of the host, in plain text, also
// while the run hangs. For the summary of a run that has failed: bounded, and never a reason to fail itself.

import { createConnection } from 'node:net';

/** Where NCCL listens unless NCCL_RAS_ADDR says otherwise. */
const DEFAULT_ADDRESS = 'localhost:28028';
/** RAS waits so long for other processes, in s: less than anybody waits for RAS. */
const RAS_SECONDS = 0.5;
/** All ranks of a host listen on one port, and a stopped one may get the connection: then another is tried, after these ms. */
const ANSWER_MS = 250;
/** Longest report kept, in characters; a healthy one has a few thousand. */
const MOST_TEXT = 1 << 16;

/** Where this environment's NCCL answers; null when it is told not to, or the address is none. */
export function rasAddress(env: NodeJS.ProcessEnv): { host: string; port: number } | null {
  if (env.NCCL_RAS_ENABLE === '0') return null;
  const match = /^\[?([^[\]]+?)\]?:(\d{1,5})$/.exec(env.NCCL_RAS_ADDR || DEFAULT_ADDRESS);
  return match && { host: match[1]!, port: Number(match[2]) };
}

/** The report of the RAS thread that answers first within `timeoutMs`, as far as it came; null when none does. */
export function askRas(address: { host: string; port: number }, timeoutMs: number): Promise<string | null> {
  return new Promise((resolve) => {
    let best = '';
    const attempts: { end(): void }[] = [];
    const finish = () => {
      clearInterval(again);
      clearTimeout(late);
      for (const attempt of attempts) attempt.end();
      resolve(best === '' ? null : best);
    };
    const begin = () => {
      attempts.push(
        query(address, (text, end) => {
          if (text.length > best.length) best = text;
          if ((end && text !== '') || end === 'refused') finish();
        }),
      );
    };
    const again = setInterval(() => {
      if (best === '') begin();
    }, ANSWER_MS);
    const late = setTimeout(finish, timeoutMs);
    begin();
  });
}

/** How a connection ended; null while it lasts. */
type End = 'closed' | 'refused' | null;

/** One connection; `heard` gets the report so far. */
function query(
  { host, port }: { host: string; port: number },
  heard: (report: string, end: End) => void,
): { end(): void } {
  let text = '';
  const socket = createConnection({ host, port });
  socket.setEncoding('utf8');
  socket.on('connect', () => socket.write(`timeout ${RAS_SECONDS}\nverbose status\n`));
  socket.on('data', (piece: string) => {
    text = (text + piece).slice(0, MOST_TEXT);
    heard(reportIn(text), text.length === MOST_TEXT ? 'closed' : null);
  });
  let end: End = 'closed';
  socket.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'ECONNREFUSED') end = 'refused';
  });
  socket.on('close', () => heard(reportIn(text), end));
  return { end: () => socket.destroy() };
}

/** Without the answer to our time-out, and without anything that a terminal would obey: anybody may hold that port. */
function reportIn(text: string): string {
  return text
    .replace(/\r/g, '')
    .replace(/^(?:OK|ERROR: Invalid timeout[^\n]*)(?:\n|$)/, '')
    .replace(/[^\P{C}\n]/gu, '')
    .trimEnd();
}
