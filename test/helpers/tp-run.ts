import { spawn } from 'node:child_process';
import { join } from 'node:path';
import { root } from './fixture.js';

export interface Outcome {
  code: number | null;
  stdout: string;
  stderr: string;
}

/** Runs the built command as a user does, without any TP_RUN_* variable of ours. */
export function tpRun(args: readonly string[], env: Record<string, string> = {}): Promise<Outcome> {
  const clean = Object.entries(process.env).filter(([name]) => !name.startsWith('TP_RUN_'));
  const child = spawn(process.execPath, [join(root, 'dist/cli/main.js'), ...args], {
    cwd: root,
    env: { ...Object.fromEntries(clean), ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    stdout += text;
  });
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    stderr += text;
  });
  return new Promise((resolve, reject) => {
    child.once('error', reject);
    child.once('close', (code) => resolve({ code, stdout, stderr }));
  });
}

/** Runs the command, which must succeed, with --json; its parsed stdout. */
export async function tpRunJson<T>(args: readonly string[]): Promise<T> {
  const { code, stdout, stderr } = await tpRun([...args, '--json']);
  if (code !== 0) throw new Error(`tp-run ${args.join(' ')} ended with ${code}:\n${stderr}`);
  return JSON.parse(stdout) as T;
}
