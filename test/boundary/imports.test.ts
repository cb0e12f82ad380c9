import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';

const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..');

/** What a room may reach besides itself. */
const ROOMS: Record<string, readonly string[]> = {
  cli: ['engine', 'model', 'comm', 'report', 'native', 'errors', 'log'],
  engine: ['model', 'comm', 'report', 'native', 'errors', 'log'],
  model: ['native', 'errors', 'log'],
  comm: ['native', 'errors', 'log'],
  report: ['native', 'errors', 'log'],
  native: ['errors', 'log'],
  errors: [],
  log: [],
};

/** What a folder of native code may include besides itself. */
const NATIVE_ROOMS: Record<string, readonly string[]> = {
  binding: ['engine', 'ops', 'comm', 'base'],
  engine: ['ops', 'comm', 'base'],
  ops: ['base'],
  comm: ['base'],
  base: [],
};

interface Reach {
  from: string;
  to: string;
}

/** Room of a file: its folder under `src` or `native`, or its own stem at the top. */
function roomOf(path: string): string {
  const [first] = path.split('/');
  return first!.replace(/\.\w+$/, '');
}

function files(folder: string, pattern: RegExp): string[] {
  return readdirSync(join(root, folder), { recursive: true, encoding: 'utf8' })
    .filter((name) => pattern.test(name))
    .map((name) => name.replaceAll('\\', '/'))
    .sort();
}

/** Relative imports of a TypeScript source, static, dynamic or of a type. */
function importsOf(source: string): string[] {
  const from = /(?:^|[\s;}])(?:import|export)\s[^'"`;]*?from\s*['"](\.[^'"]+)['"]/g;
  const bare = /\bimport\s*\(?\s*['"](\.[^'"]+)['"]/g;
  return [...source.matchAll(from), ...source.matchAll(bare)].map((match) => match[1]!);
}

function includesOf(source: string): string[] {
  return [...source.matchAll(/^\s*#\s*include\s*["<]([^">]+)[">]/gm)].map((match) => match[1]!);
}

/** Reaches that no rule allows. */
function forbidden(reaches: readonly Reach[], rooms: Record<string, readonly string[]>): string[] {
  return reaches
    .filter(({ from, to }) => roomOf(from) !== roomOf(to) && !rooms[roomOf(from)]?.includes(roomOf(to)))
    .map(({ from, to }) => `${from} -> ${to}`);
}

const sources = files('src', /\.ts$/).map((name) => ({
  name,
  text: readFileSync(join(root, 'src', name), 'utf8'),
}));
const natives = files('native', /\.(cc|h|cu|cuh)$/).map((name) => ({
  name,
  text: readFileSync(join(root, 'native', name), 'utf8'),
}));

describe('the rooms of src', () => {
  it('has a rule for every room', () => {
    expect([...new Set(sources.map(({ name }) => roomOf(name)))].filter((room) => !ROOMS[room])).toEqual([]);
  });

  it('imports downwards only', () => {
    const reaches = sources.flatMap(({ name, text }) =>
      importsOf(text).map((to) => ({
        from: name,
        to: relative(join(root, 'src'), resolve(root, 'src', dirname(name), to)),
      })),
    );
    expect(reaches.length).toBeGreaterThan(20);
    expect(forbidden(reaches, ROOMS)).toEqual([]);
  });

  it('loads the addon in native.ts alone', () => {
    const loaders = sources.filter(({ text }) => /createRequire|\.node['"]|process\.dlopen/.test(text));
    expect(loaders.map(({ name }) => name)).toEqual(['native.ts']);
  });

  it('reads the environment in cli/options.ts alone', () => {
    const readers = sources.filter(({ text }) =>
      /process\s*\.\s*env\b|process\[['"]env|\benv\b[^\n]*from 'node:process'/.test(text),
    );
    expect(readers.map(({ name }) => name)).toEqual(['cli/options.ts']);
  });

  it('keeps the sockets in comm', () => {
    const users = sources.filter(({ text }) => /from 'zeromq'/.test(text)).map(({ name }) => roomOf(name));
    expect([...new Set(users)]).toEqual(['comm']);
  });
});

describe('the rooms of native', () => {
  it('includes downwards only', () => {
    const reaches = natives.flatMap(({ name, text }) =>
      includesOf(text)
        .filter((to) => natives.some((other) => other.name === to || other.name === `${dirname(name)}/${to}`))
        .map((to) => ({
          from: name,
          to: natives.some((other) => other.name === to) ? to : `${dirname(name)}/${to}`,
        })),
    );
    expect(reaches.length).toBeGreaterThan(20);
    expect(forbidden(reaches, NATIVE_ROOMS)).toEqual([]);
  });

  it('knows every header that it includes with quotes', () => {
    const unknown = natives.flatMap(({ name, text }) =>
      [...text.matchAll(/^\s*#\s*include\s*"([^"]+)"/gm)]
        .map((match) => match[1]!)
        .filter(
          (to) =>
            ![to, `${dirname(name)}/${to}`].some((path) => natives.some((other) => other.name === path)),
        )
        .map((to) => `${name} -> ${to}`),
    );
    expect(unknown).toEqual([]);
  });

  it('lets only the binding see Node', () => {
    const users = natives.filter(({ text }) =>
      /#\s*include\s*[<"](napi|node_api|js_native_api|uv|v8|node)\b/.test(text),
    );
    expect([...new Set(users.map(({ name }) => roomOf(name)))]).toEqual(['binding']);
  });

  it('keeps assembly, and what only nvcc can parse, in base/ptx.cuh', () => {
    const users = natives.filter(({ text }) =>
      /\basm\b\s*(volatile)?\s*\(|<<<|extern\s+__shared__/.test(text.replace(/\/\/.*$/gm, '')),
    );
    expect(users.map(({ name }) => name)).toEqual(['base/ptx.cuh']);
  });

  it('has no sockets', () => {
    const users = natives.filter(({ text }) => /#\s*include\s*<(sys\/socket|netinet|zmq)/.test(text));
    expect(users.map(({ name }) => name)).toEqual([]);
  });
});

describe('the rules themselves', () => {
  it('see a forbidden import in every form it can take', () => {
    const source = `
      import { a } from '../comm/zmq.js';
      import type { B } from "../comm/control.js";
      export { c } from '../comm/local.js';
      export * from '../comm/collective.js';
      import '../comm/side.js';
      const d = await import('../comm/dynamic.js');
      import {
        e,
      } from '../comm/lines.js';`;
    expect(importsOf(source)).toHaveLength(7);
    const reaches = importsOf(source).map((to) => ({ from: 'model/shard.ts', to: to.slice(3) }));
    expect(forbidden(reaches, ROOMS)).toHaveLength(7);
  });

  it('let a room reach itself and what lies below', () => {
    expect(forbidden([{ from: 'cli/main.ts', to: 'cli/options.js' }], ROOMS)).toEqual([]);
    expect(forbidden([{ from: 'engine/rank.ts', to: 'comm/zmq.js' }], ROOMS)).toEqual([]);
    expect(forbidden([{ from: 'native.ts', to: 'engine/job.js' }], ROOMS)).toEqual([
      'native.ts -> engine/job.js',
    ]);
  });
});
