// What this machine offers to a run: processors, GPUs, libraries, room.

import { existsSync, readdirSync, readFileSync, statfsSync } from 'node:fs';
import { freemem, totalmem } from 'node:os';
import { join } from 'node:path';

/** Names of the NVIDIA GPUs that the driver shows; [] without a driver. */
export function gpuNames(): string[] {
  const folder = '/proc/driver/nvidia/gpus';
  if (!existsSync(folder)) return [];
  return readdirSync(folder).map((bus) => {
    const text = readFileSync(join(folder, bus, 'information'), 'utf8');
    return /^Model:\s*(.+)$/m.exec(text)?.[1]?.trim() ?? bus;
  });
}

/** Version of the NVIDIA driver as the kernel's module tells it; null when it does not. */
export function driverOfProc(): string | null {
  try {
    const text = readFileSync('/proc/driver/nvidia/version', 'utf8');
    return /\b(\d{3,}\.\d+(?:\.\d+)?)\b/.exec(text)?.[1] ?? null;
  } catch {
    return null;
  }
}

/** Folder that holds a shared library, among the usual ones; null when it is in none. */
export function findLibrary(name: string): string | null {
  const folders = [
    '/usr/lib/x86_64-linux-gnu',
    '/usr/lib/aarch64-linux-gnu',
    '/usr/lib64',
    '/usr/lib',
    '/usr/local/lib',
    '/usr/local/cuda/lib64',
  ];
  return folders.find((folder) => existsSync(join(folder, name))) ?? null;
}

export function memoryGb(): { total: number; free: number } {
  return { total: gb(totalmem()), free: gb(freemem()) };
}

/** Free and whole size of the file system at `path` in GB; null when there is no such place. */
export function roomGb(path: string): { total: number; free: number } | null {
  try {
    const { bavail, blocks, bsize } = statfsSync(path);
    return { total: gb(blocks * bsize), free: gb(bavail * bsize) };
  } catch {
    return null;
  }
}

function gb(bytes: number): number {
  return Math.round(bytes / 1e8) / 10;
}
